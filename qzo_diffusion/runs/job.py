"""A run that is under way, whatever it trains: what happens between its steps, and what it leaves
behind.
"""

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from qzo_diffusion import devices
from qzo_diffusion.config.sections import RunConfig
from qzo_diffusion.core.errors import UserError
from qzo_diffusion.core.journal import JournalWriter
from qzo_diffusion.core.optimizer import Schedule
from qzo_diffusion.core.parametrization import Parametrization, tuned_scales
from qzo_diffusion.core.probes import Objective
from qzo_diffusion.core.probing import Probing, StepBatch
from qzo_diffusion.core.scales import ScaleSet
from qzo_diffusion.core.spsa import SumOverRanks, mean_loss, no_reduce
from qzo_diffusion.quant.base import fingerprint
from qzo_diffusion.runs import provenance, usage
from qzo_diffusion.runs import report as report_run
from qzo_diffusion.runs.ending import in_words
from qzo_diffusion.train.checkpoint import (
    Checkpoint,
    checkpoint_folder,
    drop_old,
    entry_of,
    save_checkpoint,
)
from qzo_diffusion.train.distributed import Ranks
from qzo_diffusion.train.loop import Outcome, Setup, StepRecord, TakeStep
from qzo_diffusion.train.run_folder import RunFolder
from qzo_diffusion.train.tracking import Tracker

CHECK_RANKS_EVERY = 100
PACE_AFTER = 5  # steps


@dataclass
class Components:
    """What every process of a run has: the trained numbers, what they are trained on, and how.

    optimizer: `core.optimizer.Optimizer`, or whatever `take_step` uses in its place with `state`
    and `load_state_`. header: of the journal. extras: made by the first process alone, which also
    writes what the run folder says of its data."""

    scales: ScaleSet
    theta: Parametrization
    optimizer: Any
    objective: Objective[Any]
    batches: Callable[[int], StepBatch[Any]]
    header: dict[str, Any]
    callbacks: Callable[[RunFolder, Tracker], "Callbacks"]
    take_step: TakeStep | None = None

    def setup(
        self, probing: Probing, schedule: Schedule, sum_over_ranks: SumOverRanks = no_reduce
    ) -> Setup[Any]:
        """These components as the loop takes them."""
        return Setup(
            self.objective,
            self.batches,
            self.theta,
            self.optimizer,
            probing,
            schedule,
            sum_over_ranks,
            self.take_step,
        )


class Callbacks(Protocol):
    """What a kind of run does besides training, such as pictures of every few steps.

    held_out: micro-batches of the validation loss, always the same. every: how often `show` is due;
    0 is at the start and the end."""

    held_out: Sequence[Any]
    every: int

    def show(self, step: int) -> None:
        """What is due at this step and not there yet.

        The numbers of the step are in the scales that a forward sees.
        """
        ...

    def results(self) -> dict[str, Any]:
        """Further figures for `--json`."""
        ...


@dataclass
class Trainer:
    """What the first process does between two steps: it writes, validates and shows.

    Everything is done once, whether the run was stopped in between or not: what exists is not
    redone."""

    config: RunConfig
    out: RunFolder
    components: Components
    callbacks: Callbacks
    tracker: Tracker
    journal: JournalWriter | None
    ranks: Ranks
    metadata: dict[str, str]
    validation: dict[int, float] = field(default_factory=dict)
    steps_done: int = 0
    started: float = field(default_factory=time.monotonic)
    _seconds: list[float] = field(default_factory=list)

    def on_step(self, record: StepRecord) -> None:
        """Metrics first: after a kill they are cut back to the journal, and so never lack a step
        that it has.
        """
        self.tracker.on_step(record)
        if self.journal is not None:
            self.journal.append(entry_of(record, self.config.train.seed))
        self.steps_done = record.step + 1
        self._tell_pace(record.seconds)

    def _tell_pace(self, seconds: float) -> None:
        """After the first steps of this process: a step's time, and the whole run's."""
        if len(self._seconds) >= PACE_AFTER:
            return
        self._seconds.append(seconds)
        left = self.config.train.max_steps - self.steps_done
        if len(self._seconds) == PACE_AFTER and left:
            step = statistics.median(self._seconds)
            self.tracker.say(
                f"a step takes {in_words(step)}; the {left} steps that are left take about "
                f"{in_words(left * step)}, pictures and validation apart"
            )

    def after_step(self, steps_done: int) -> None:
        if _due(CHECK_RANKS_EVERY, steps_done):
            check_ranks(self.ranks, self.components.theta)
        self.finish_step(steps_done)

    def finish_step(self, steps_done: int) -> None:
        """What is due after this step and not there yet."""
        if _due(self.config.train.validate_every, steps_done):
            self.validate(steps_done)
        if _due(self.config.train.checkpoint_every, steps_done):
            self.checkpoint(steps_done)
        if _due(self.callbacks.every, steps_done):
            self.show(steps_done)
        if _due(self.config.train.validate_every, steps_done) or _due(
            self.callbacks.every, steps_done
        ):
            self.report()

    def validate(self, step: int) -> None:
        if not self.callbacks.held_out or step in self.validation:
            return
        with self.components.scales.override(self.components.theta.perturbed()):
            self.validation[step] = mean_loss(self.components.objective, self.callbacks.held_out)
        self.tracker.on_validation(step, self.validation[step])

    def show(self, step: int) -> None:
        with self.components.scales.override(self.components.theta.perturbed()):
            self.callbacks.show(step)

    def checkpoint(self, step: int) -> None:
        folder = checkpoint_folder(self.out.path / "checkpoints", step)
        if folder.exists():  # a kill may have come in between
            drop_old(folder.parent, self.config.train.keep_checkpoints)
            return
        if self.journal is not None:
            self.journal.sync()
        chain = "" if self.journal is None else self.journal.chain
        save_checkpoint(
            Checkpoint(folder, step, chain, self.validation.get(step)),
            self.components.theta,
            self.components.optimizer,
            metadata=self.metadata | {"qzo.steps": str(step)},
            keep=self.config.train.keep_checkpoints,
        )

    def finish(self, step: int) -> None:
        if self.journal is not None:
            self.journal.sync()
        self.out.save_scales(
            "final", tuned_scales(self.components.theta), self.metadata | {"qzo.steps": str(step)}
        )

    def report(self) -> None:
        """The page as the run is now. No run is stopped for it."""
        try:
            usage.record(self.out, next(iter(self.components.scales.tensors().values())).device)
            report_run.write(self.out.path)
        except (OSError, ValueError, UserError) as error:
            self.tracker.say(f"warning: no report: {error}")

    def results(self, outcome: Outcome) -> dict[str, Any]:
        """The figures for `--json`."""
        steps = sorted(self.validation)
        peak = devices.peak_bytes(next(iter(self.components.scales.tensors().values())).device)
        return {
            "run": str(self.out.path),
            "steps": outcome.steps_done,
            "max_steps": self.config.train.max_steps,
            "seconds": time.monotonic() - self.started,
            "peak_memory_gb": None if peak is None else peak / 1e9,
            "skipped": outcome.skipped,
            "stopped": outcome.stopped,
            "validation_loss": {
                "start": self.validation[steps[0]],
                "end": self.validation[steps[-1]],
            }
            if steps
            else None,
            "processes": self.ranks.world,
            "bytes_sent": self.ranks.bytes_sent,
        } | self.callbacks.results()

    def close(self) -> None:
        self.tracker.close()
        if self.journal is not None:
            self.journal.close()


def check_ranks(ranks: Ranks, theta: Parametrization) -> None:
    """Every rank calls this after the same step; raises RankLost when the trained numbers of one
    are others.
    """
    if ranks.world > 1:
        ranks.check_equal(bytes.fromhex(fingerprint(theta.state().items())), "trained numbers")


def check_same_run(
    ranks: Ranks,
    settings: Mapping[str, Any],
    data: Sequence[Mapping[str, Any]],
    facts: Sequence[str],
    header: Mapping[str, Any],
) -> None:
    """Raises RankLost when a rank was started with another model, other data or settings.

    Args:
        settings: all but folders, which may differ by machine.
        data, facts: the rows of dataset.json, and which of their columns make the run.
    """
    base = [header[name] for name in ("codes", "initial_scales")]
    rows = [[row["file"], *(row[fact] for fact in facts)] for row in data]
    text = json.dumps([settings, base, rows], sort_keys=True, default=str)
    ranks.check_equal(
        hashlib.blake2b(text.encode(), digest_size=16).digest(), "model, data or settings"
    )


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def journal_header(config: RunConfig, batch_size: int, codes: str, scales: str) -> dict[str, Any]:
    """What the journal must say to be replayed from the base model alone."""
    return {
        "format": provenance.JOURNAL_FORMAT,
        "model": config.model,
        "codes": codes,
        "initial_scales": scales,
        "config": provenance.config_hash(config),
        "seed": config.train.seed,
        "directions": config.qzo.directions,
        "num_directions": config.qzo.num_directions,
        "parametrization": config.qzo.parametrization,
        "units": config.qzo.units,
        "layers": config.qzo.layers,
        "regions": config.qzo.regions,
        # with a direction each
        "examples": batch_size * config.qzo.num_directions if config.qzo.per_example else None,
        "optimizer": config.train.optimizer,
        "feedback": [config.train.feedback_decay, config.train.feedback_steps]
        if config.train.optimizer == "feedback"
        else None,
        # by a step's own spread its scalars are already
        "normalize": "running" if config.qzo.normalize == "running" else None,
        "quant": config.quant.model_dump(),
        "dtype": config.compute.dtype,
    }
