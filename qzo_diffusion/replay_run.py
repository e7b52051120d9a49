"""What `qzo-diffuse replay` does: the scales of any step, from the base model and a journal alone."""

import time
from pathlib import Path
from typing import Any

from qzo_diffusion import build
from qzo_diffusion.config import Config, TrainConfig, make_config
from qzo_diffusion.core.errors import JournalError
from qzo_diffusion.core.journal import Journal, read_journal, replay_
from qzo_diffusion.core.parametrization import tuned_scales
from qzo_diffusion.train.run_folder import RunFolder

_NUMBERS = ("directions", "num_directions", "parametrization", "units", "layers", "regions")  # what settles the trained numbers


def run(journal_file: Path, model: str | None, to_step: int | None, output_dir: Path) -> dict[str, Any]:
    """Rebuild step `to_step` (the journal's last when None) and leave it in `output_dir/final`.

    Raises:
        JournalError: the journal is damaged, shorter than `to_step`, or of another model.
    """
    journal = read_journal(journal_file)
    if to_step is not None and not 0 <= to_step <= journal.steps_done:
        raise JournalError(f"--to-step {to_step}", f"0 to {journal.steps_done}, where the journal ends", "choose an earlier step")
    config = config_of(journal, model)
    transformer, scales, numbers = build.load_base(config, build.find_place(config))
    codes, initial = build.fingerprints(transformer, scales)
    build.check_journal_fits(journal, {**journal.header, "codes": codes, "initial_scales": initial})
    out = RunFolder.create(output_dir)
    started = time.perf_counter()
    steps = replay_(journal, numbers, build.optimizer(config), to_step=to_step)
    seconds = time.perf_counter() - started
    metadata = build.scales_metadata(config, codes) | {"qzo.steps": str(steps)}
    out.save_scales("final", tuned_scales(numbers), metadata)
    out.write_text("config.yaml", config.to_yaml())
    return {"run": str(output_dir), "steps": steps, "seconds": seconds, "torn_bytes": journal.torn_bytes}


def config_of(journal: Journal, model: str | None) -> Config:
    """The settings that a journal's header names; everything else is as by default and does not matter for a replay."""
    header = journal.header
    if header.get("kind") == "llm":
        raise JournalError(
            "a journal of a language model", "one of a style run", "rebuild its scales with `qzo-diffuse llm train --resume RUN`"
        )
    try:
        decay, steps = header.get("feedback") or (TrainConfig().feedback_decay, TrainConfig().feedback_steps)
        feedback = {"feedback_decay": decay, "feedback_steps": steps}
        return make_config(
            {
                "model": model or header["model"],
                "method": "quzo" if header["parametrization"] == "codes" else "qzo",
                "train": {"seed": header["seed"], "optimizer": header["optimizer"]} | feedback,
                "qzo": {key: header[key] for key in _NUMBERS},
                "quant": header["quant"],
                "compute": {"dtype": header["dtype"]},
            }
        )
    except KeyError as error:
        raise JournalError(f"a journal without {error} in its header", "a journal of a run", "give journal.qzo of a run") from None
