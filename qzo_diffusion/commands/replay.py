"""What `qzo-diffuse replay` does: the scales of any step, from the base model and a journal
alone.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qzo_diffusion import devices
from qzo_diffusion.config.files import AnyConfig, make_config, with_whole_paths
from qzo_diffusion.config.llm import LlmConfig
from qzo_diffusion.config.sections import RunConfig, TrainConfig
from qzo_diffusion.config.style import Config
from qzo_diffusion.core.errors import JournalError
from qzo_diffusion.core.journal import Journal, read_journal, replay_
from qzo_diffusion.core.merge import check_numbers
from qzo_diffusion.core.optimizer import Optimizer
from qzo_diffusion.core.parametrization import Parametrization, tuned_scales
from qzo_diffusion.files import ANOTHER, check_empty, unfinished
from qzo_diffusion.runs import build, provenance
from qzo_diffusion.runs.llm.methods import load_base as load_language_base
from qzo_diffusion.runs.llm.models import choose_lm
from qzo_diffusion.runs.style import pipeline
from qzo_diffusion.runs.tuned import set_initial_
from qzo_diffusion.train.run_folder import RunFolder

# what settles the trained numbers
_NUMBERS = ("directions", "num_directions", "parametrization", "units", "layers", "regions")


def run(
    journal_file: Path,
    model: str | None,
    to_step: int | None,
    output_dir: Path,
    init_from: str | None = None,
) -> dict[str, Any]:
    """Rebuild step `to_step` (the journal's last when None) and leave it in `output_dir/final`.

    Args:
        init_from: where the scales are that the run began with, if they were another run's; None:
            where they were then.

    Raises:
        JournalError: the journal is damaged, shorter than `to_step`, or of another model.
    """
    check_empty(output_dir, ANOTHER)
    journal = read_journal(journal_file)
    if to_step is not None and not 0 <= to_step <= journal.steps_done:
        raise JournalError(
            f"--to-step {to_step}",
            f"0 to {journal.steps_done}, where the journal ends",
            "choose an earlier step",
        )
    config: RunConfig
    if journal.header.get("kind") == "llm":
        config = language_config_of(journal, model)
        theta, optimizer, (codes, initial), facts = _language_base(config)
    else:
        config = config_of(journal, model, init_from)
        theta, optimizer, (codes, initial), facts = _style_base(config)
    provenance.check_journal_fits(
        journal, {**journal.header, "codes": codes, "initial_scales": initial}
    )
    started = time.perf_counter()
    steps = replay_(journal, theta, optimizer, to_step=to_step)
    seconds = time.perf_counter() - started
    tuned = tuned_scales(theta)
    check_numbers(theta.scales, tuned)
    metadata = provenance.scales_metadata(config, codes) | facts | {"qzo.steps": str(steps)}
    out = RunFolder.create(output_dir, ANOTHER)
    with unfinished(output_dir, ("config.yaml", "final")):
        out.write_text("config.yaml", with_whole_paths(config).to_yaml())
        out.save_scales("final", tuned, metadata)
    return {
        "run": str(output_dir),
        "steps": steps,
        "seconds": seconds,
        "torn_bytes": journal.torn_bytes,
    }


_Base = tuple[Parametrization, Optimizer, tuple[str, str], dict[str, str]]
"""Numbers, optimizer, hashes of what stays and of what is trained, and what else tuned scales say
of themselves.
"""


def _style_base(config: Config) -> _Base:
    transformer, scales, theta = pipeline.load_base(config, pipeline.find_runtime(config))
    set_initial_(config, transformer, scales)
    return theta, build.optimizer(config), build.fingerprints(transformer, scales), {}


def _language_base(config: LlmConfig) -> _Base:
    device = devices.choose_device(config.compute.device)
    folder, _ = choose_lm(config.model)
    base = load_language_base(
        config, folder, device, devices.choose_dtype(config.compute.dtype, device)
    )
    facts = {"qzo.method": config.method, "qzo.task": config.task}
    return base.theta, base.optimizer, (base.codes, base.initial), facts


def config_of(journal: Journal, model: str | None, init_from: str | None = None) -> Config:
    """The settings that a journal's header names; everything else is as by default and does not
    matter for a replay.
    """
    method = "quzo" if journal.header.get("parametrization") == "codes" else "qzo"
    return _config(
        journal,
        Config,
        {"method": method, "init_from": init_from or journal.header.get("init_from")},
        model,
    )


def language_config_of(journal: Journal, model: str | None) -> LlmConfig:
    """As `config_of`, of a run on a language model; its task is kept, so that `llm evaluate` finds
    it.
    """
    try:
        own = {name: journal.header[name] for name in ("method", "task", "lora", "data")}
    except KeyError as error:
        raise _without(error) from None
    return _config(journal, LlmConfig, own, model)


def _config(
    journal: Journal, kind: type[AnyConfig], own: dict[str, Any], model: str | None
) -> AnyConfig:
    header = journal.header
    try:
        decay, steps = header.get("feedback") or (
            TrainConfig().feedback_decay,
            TrainConfig().feedback_steps,
        )
        feedback = {"feedback_decay": decay, "feedback_steps": steps}
        settings = {
            "model": model or header["model"],
            "train": {"seed": header["seed"], "optimizer": header["optimizer"]} | feedback,
            "qzo": {key: header[key] for key in _NUMBERS} | _also(header),
            "quant": header["quant"],
            "compute": {"dtype": header["dtype"]},
        }
    except KeyError as error:
        raise _without(error) from None
    return make_config(settings | own, kind)


def _also(header: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `qzo` that journals name only where they matter, or did not name at first."""
    running = {"normalize": "running"} if header.get("normalize") else {}
    return running | ({"unquantized": header["unquantized"]} if "unquantized" in header else {})


def _without(error: KeyError) -> JournalError:
    return JournalError(
        f"a journal without {error} in its header",
        "a journal of a run",
        "give journal.qzo of a run",
    )
