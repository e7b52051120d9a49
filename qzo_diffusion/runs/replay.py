"""Rebuild the scales of any step from the base model and a journal alone."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qzo_diffusion.config.files import AnyConfig, make_config, with_whole_paths
from qzo_diffusion.config.sections import RunConfig, TrainConfig
from qzo_diffusion.core.errors import JournalError
from qzo_diffusion.core.journal import Journal, read_journal, replay_
from qzo_diffusion.core.merge import check_numbers
from qzo_diffusion.core.optimizer import Optimizer
from qzo_diffusion.core.parametrization import Parametrization, tuned_scales
from qzo_diffusion.runs import provenance
from qzo_diffusion.runs.calibration import ROOM
from qzo_diffusion.runs.subspace import file_hash
from qzo_diffusion.system.files import ANOTHER, check_empty, unfinished
from qzo_diffusion.train.run_folder import RunFolder

# settings that determine theta
_NUMBERS = ("directions", "num_directions", "parametrization", "units", "layers", "regions")


@dataclass(frozen=True)
class Base:
    """The base that a journal is replayed over.

    Attributes:
        codes, initial: hashes of the frozen and of the trained tensors.
        facts: further metadata of tuned scales.
        keep: writes what else of the run's folder the base is made of.
    """

    config: RunConfig
    theta: Parametrization
    optimizer: Optimizer
    codes: str
    initial: str
    facts: dict[str, str]
    keep: Callable[[Path], None] = lambda target: None


def read(journal_file: Path, to_step: int | None, output_dir: Path) -> Journal:
    """Read the journal, with all checks that need no model.

    Raises:
        JournalError: it is damaged, or shorter than `to_step`.
        OutputError: `output_dir` exists already.
    """
    check_empty(output_dir, ANOTHER)
    journal = read_journal(journal_file)
    if to_step is not None and not 0 <= to_step <= journal.steps_done:
        raise JournalError(
            f"--to-step {to_step}",
            f"0 to {journal.steps_done}, where the journal ends",
            "choose an earlier step",
        )
    return journal


def replay(journal: Journal, base: Base, to_step: int | None, output_dir: Path) -> dict[str, Any]:
    """Rebuild step `to_step` (the journal's last when None) in `output_dir/final`.

    Raises:
        JournalError: the journal belongs to another model.
    """
    provenance.check_journal_fits(
        journal,
        {**journal.header, "codes": base.codes, "initial_scales": base.initial}
        | {"subspace": file_hash(base.config.qzo.subspace)},
    )
    started = time.perf_counter()
    steps = replay_(journal, base.theta, base.optimizer, to_step=to_step)
    seconds = time.perf_counter() - started
    tuned = tuned_scales(base.theta)
    check_numbers(base.theta.scales, tuned)
    facts = base.facts | {"qzo.steps": str(steps)}
    out = RunFolder.create(output_dir, ANOTHER)
    with unfinished(output_dir, ("config.yaml", "final")):
        out.write_text("config.yaml", with_whole_paths(base.config).to_yaml())
        out.save_scales("final", tuned, provenance.scales_metadata(base.config, base.codes) | facts)
        base.keep(output_dir)
    return {
        "run": str(output_dir),
        "steps": steps,
        "seconds": seconds,
        "torn_bytes": journal.torn_bytes,
    }


def settings_of(
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
            "train": {"seed": header["seed"], "optimizer": header["optimizer"]}
            | {"state_bits": header.get("state_bits") or 32}
            | feedback
            | _rate(header),
            "qzo": {key: header[key] for key in _NUMBERS} | _also(header),
            "prior": _prior(header),
            "quant": header["quant"],
            "compute": {"dtype": header["dtype"]},
        }
    except KeyError as error:
        raise without(error) from None
    return make_config(settings | own, kind)


def _also(header: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of `qzo` that journals name only if they matter, or did not name at first."""
    running = {"normalize": "running"} if header.get("normalize") else {}
    if "subspace_file" in header:
        running |= {"subspace": header["subspace_file"]}
    return running | ({"unquantized": header["unquantized"]} if "unquantized" in header else {})


def _prior(header: Mapping[str, Any]) -> dict[str, Any]:
    """The run's prior, with the bound as it was calibrated; journals did not name it at first."""
    decay, bound = header.get("prior") or (0.0, None)
    return {"decay": decay, "bound": None if bound is None else bound * header.get(ROOM, 1.0)}


def _rate(header: Mapping[str, Any]) -> dict[str, Any]:
    """A rate that goes with the decay; each step of a journal has its own."""
    decay, _ = header.get("prior") or (0.0, None)
    return {"lr": 0.5 / decay} if decay else {}


def without(error: KeyError) -> JournalError:
    return JournalError(
        f"a journal without {error} in its header",
        "a journal of a run",
        "give journal.qzo of a run",
    )
