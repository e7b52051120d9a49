"""Checkpoints, and how a run resumes from them and its journal as if it had never been stopped.

A checkpoint only saves time: resume loads the newest whole one and applies the journal's tail with
the function that training uses. Without any checkpoint the journal alone rebuilds the run."""

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from qzo_diffusion.core.errors import JournalError, OutputError
from qzo_diffusion.core.journal import Journal, replay_
from qzo_diffusion.core.journal_format import StepEntry
from qzo_diffusion.core.optimizer import Optimizer
from qzo_diffusion.core.parametrization import Parametrization, tuned_scales
from qzo_diffusion.system.files import check_folder, remove_folder, write_folder, write_whole
from qzo_diffusion.system.reading import parse_json, read_json, read_json_lines
from qzo_diffusion.train.loop import StepRecord
from qzo_diffusion.train.run_folder import SCALES, load_tensors, save_tensors

NUMBERS, OPTIMIZER, STATE = "numbers.safetensors", "optimizer.safetensors", "state.json"
LARGEST_STATE = 2**16  # bytes


class Stateful(Protocol):
    """Any optimizer, as a checkpoint needs it."""

    def state(self) -> dict[str, Tensor]: ...

    def load_state_(self, state: dict[str, Tensor]) -> None: ...


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's folder and facts; `chain` is where its journal was then."""

    folder: Path
    step: int
    chain: str
    validation_loss: float | None = None


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    """Return the folder of the checkpoint after so many steps."""
    return checkpoints / f"step_{step:06d}"


def save_checkpoint(
    checkpoint: Checkpoint,
    theta: Parametrization,
    optimizer: Stateful,
    *,
    metadata: Mapping[str, str],
    keep: int = 3,
) -> Path | None:
    """Write `checkpoint.folder`, then drop all but the last `keep` and the one with the lowest
    validation loss.

    Returns None, and changes nothing, where a scale is not finite: no run could go on from there.
    """
    tuned = tuned_scales(theta)
    if not all(bool(one.isfinite().all()) for one in tuned.values()):
        return None
    state = {
        "step": checkpoint.step,
        "chain": checkpoint.chain,
        "validation_loss": checkpoint.validation_loss,
    }

    def write(folder: Path) -> None:
        save_tensors(folder / NUMBERS, theta.state())
        save_tensors(folder / OPTIMIZER, optimizer.state())
        save_tensors(folder / SCALES, tuned, metadata)
        write_whole(folder / STATE, json.dumps(state).encode())

    path = write_folder(checkpoint.folder, write)
    drop_old(checkpoint.folder.parent, keep)
    return path


def drop_old(checkpoints: Path, keep: int) -> None:
    """Leave the last `keep` and the one with the lowest validation loss, and nothing that a kill
    left half written or dropped.
    """
    whole, _ = list_checkpoints(checkpoints, check=False)
    losses = [
        math.nan if checkpoint.validation_loss is None else checkpoint.validation_loss
        for checkpoint in whole
    ]
    scored = [(loss, place) for place, loss in enumerate(losses) if not math.isnan(loss)]
    best = whole[min(scored)[1]] if scored else None
    for checkpoint in whole[:-keep]:
        if checkpoint is not best:
            remove_folder(checkpoint.folder)
    for left in checkpoints.glob(".step_*"):
        shutil.rmtree(left, ignore_errors=True)


def read_checkpoint(folder: Path, check: bool = True) -> Checkpoint:
    """Raises OutputError unless the checkpoint is whole.

    Without `check` the hashes of its files are believed.
    """
    if check:
        check_folder(folder)
    try:
        state = read_json(folder / STATE, LARGEST_STATE)
        loss = state["validation_loss"]
        step = int(state["step"])
        if step < 0:
            raise ValueError(f"step {step}")
        return Checkpoint(folder, step, str(state["chain"]), None if loss is None else float(loss))
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise OutputError(
            f"{folder / STATE} is damaged: {error}", "the state of a run", "give another checkpoint"
        ) from None


def list_checkpoints(checkpoints: Path, check: bool = True) -> tuple[list[Checkpoint], list[str]]:
    """All whole checkpoints, oldest first, and a message for each damaged one."""
    found, damaged = examine_checkpoints(checkpoints, check)
    return found, list(damaged.values())


def examine_checkpoints(
    checkpoints: Path, check: bool = True
) -> tuple[list[Checkpoint], dict[Path, str]]:
    """List checkpoints like `list_checkpoints`, with the problem of each damaged folder."""
    found: list[Checkpoint] = []
    damaged: dict[Path, str] = {}
    for folder in sorted(checkpoints.glob("step_*")):
        try:
            found.append(read_checkpoint(folder, check))
        except OutputError as error:
            damaged[folder] = error.got
    return sorted(found, key=lambda checkpoint: checkpoint.step), damaged


def set_aside(damaged: Iterable[Path]) -> None:
    """Rename damaged checkpoints, so that the run can write whole ones in their place."""
    for folder in damaged:
        aside = folder.with_name(f"damaged_{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)


def restore_(
    checkpoint: Checkpoint | None, journal: Journal, theta: Parametrization, optimizer: Optimizer
) -> int:
    """Bring `theta` and `optimizer` to the end of the journal. Returns the number of steps done.

    Raises:
        JournalError: the journal is shorter than the checkpoint, or of another run.
        OutputError: the checkpoint does not fit this model.
    """
    if checkpoint is None:
        return replay_(journal, theta, optimizer)
    if not journal.holds(checkpoint.chain):
        raise JournalError(
            f"a journal that ends at step {journal.steps_done} and never was where checkpoint "
            f"{checkpoint.folder.name} was written",
            "the journal of the run that wrote the checkpoint, whole",
            "restore journal.qzo; the checkpoint itself can still be sampled and exported, by "
            "--run",
        )
    load_checkpoint_(checkpoint, theta, optimizer)
    return max(checkpoint.step, replay_(journal, theta, optimizer, first_step=checkpoint.step))


def load_checkpoint_(checkpoint: Checkpoint, theta: Parametrization, optimizer: Stateful) -> None:
    """Load θ and the optimizer's state from a checkpoint, onto the device of `theta`.

    Raises OutputError when the checkpoint does not fit this model.
    """
    device = next(iter(theta.templates().values())).device
    try:
        theta.load_state_(load_tensors(checkpoint.folder / NUMBERS)[0])
        state, _ = load_tensors(checkpoint.folder / OPTIMIZER)
        optimizer.load_state_({name: tensor.to(device) for name, tensor in state.items()})
    except (ValueError, KeyError, RuntimeError) as error:
        raise OutputError(
            f"{checkpoint.folder} does not fit: {error}",
            "a checkpoint of this model",
            "give its own",
        ) from None


def entry_of(record: StepRecord, seed: int) -> StepEntry:
    """The journal's entry for a step's record."""
    applied = record.estimate.projected_grad
    return StepEntry(record.step, seed, record.lr, record.eps, record.loss, applied, record.skipped)


def cut_metrics(path: Path, steps_done: int) -> dict[int, float]:
    """Remove lines of metrics.jsonl beyond the journal's last step, and torn lines.

    Returns validation losses by step.
    """
    if not path.exists():
        return {}
    kept: list[bytes] = []
    validation: dict[int, float] = {}
    try:
        for line in read_json_lines(path):
            entry = _parsed(line)
            if entry is None or entry["step"] >= steps_done + ("validation_loss" in entry):
                continue
            kept.append(line)
            if "validation_loss" in entry:
                validation[entry["step"]] = float(entry["validation_loss"])
    except (OSError, ValueError) as error:
        raise OutputError(
            f"{path} is damaged: {error}", "a line for each step", "restore it, or delete it"
        ) from None
    write_whole(path, b"".join(kept))
    return validation


def bad_steps_at_end(journal: Journal) -> int:
    """Return the number of skipped steps in a row at the end of the journal."""
    count = 0
    for entry in reversed(journal.steps):
        if not entry.skipped:
            break
        count += 1
    return count


def _parsed(line: bytes) -> dict[str, Any] | None:
    """Parse a line of metrics; None for a line that no run writes."""
    try:
        entry = parse_json(line)
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            return None
        float(entry.get("validation_loss", 0))
    except (ValueError, TypeError, OverflowError):
        return None
    return entry
