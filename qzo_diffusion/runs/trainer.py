"""Write everything that rank 0 leaves while a run goes on."""

import math
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

from qzo_diffusion import devices
from qzo_diffusion.config.sections import RunConfig
from qzo_diffusion.core.errors import OutputError, UserError
from qzo_diffusion.core.journal import JournalWriter
from qzo_diffusion.core.parametrization import tuned_scales
from qzo_diffusion.core.spsa import mean_loss
from qzo_diffusion.runs import ranks as all_ranks
from qzo_diffusion.runs import report as report_run
from qzo_diffusion.runs import usage
from qzo_diffusion.runs.ending import in_words
from qzo_diffusion.runs.plan import Callbacks, Components
from qzo_diffusion.train.checkpoint import (
    Checkpoint,
    checkpoint_folder,
    drop_old,
    entry_of,
    load_checkpoint_,
    read_checkpoint,
    save_checkpoint,
)
from qzo_diffusion.train.distributed import Ranks
from qzo_diffusion.train.loop import Outcome, StepRecord
from qzo_diffusion.train.run_folder import RunFolder
from qzo_diffusion.train.stopping import Limits, Reason, best_step
from qzo_diffusion.train.tracking import Tracker

PACE_AFTER = 5  # steps


@dataclass
class Trainer:
    """Write metrics, journal, checkpoints, samples and the report on rank 0.

    Validation losses, samples and checkpoints that exist are not made again. The report is written
    anew each time.
    """

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
    limits: Limits = field(default_factory=Limits)
    ended_by: Reason | None = None
    final_step: int | None = None
    _seconds: list[float] = field(default_factory=list)

    def on_step(self, record: StepRecord) -> None:
        """Append the step to metrics.jsonl, then to the journal.

        In this order, a kill never leaves a step in the journal that the metrics lack.
        """
        self.tracker.on_step(record)
        if self.journal is not None:
            self.journal.append(entry_of(record, self.config.train.seed))
        self.steps_done = record.step + 1
        self._report_pace(record.seconds)

    def _report_pace(self, seconds: float) -> None:
        """Report the time of a step and the time that is left, once."""
        if len(self._seconds) >= PACE_AFTER:
            return
        self._seconds.append(seconds)
        left = self.config.train.max_steps - self.steps_done
        if len(self._seconds) == PACE_AFTER and left:
            step = statistics.median(self._seconds)
            self.tracker.report(
                f"a step takes {in_words(step)}; the {left} steps that are left take about "
                f"{in_words(left * step)}, without pictures and validation"
            )

    def begin(self) -> None:
        """Do the work before the first step."""
        self.validate(0)
        self.keep_if_best(0)
        self.show(0)
        self.report()

    def end(self, outcome: Outcome) -> None:
        """Do the work after the last step, at a limit, or at the step where the run was stopped."""
        if self.interrupted(outcome):
            self.checkpoint(outcome.steps_done)
        else:
            self._finish(outcome)
        self.report()

    def _finish(self, outcome: Outcome) -> None:
        """Validate, choose the step whose scales are the run's result, show and save them."""
        done = outcome.steps_done
        self.validate(done)
        if outcome.stopped:  # so that the run can go on
            self.checkpoint(done)
        self.final_step = self._restore_best(done)
        if outcome.stopped or self.limits.patience is not None:
            self.tracker.on_final(done, self.final_step)
        self.show(self.final_step)
        self.finish(self.final_step)

    def at_limit(self) -> bool:
        """Whether the run is to end before its next step by itself."""
        self.ended_by = self.ended_by or self.limits.reached(self.due_losses())
        return self.ended_by is not None

    def interrupted(self, outcome: Outcome) -> bool:
        """Whether a person or a signal stopped the run, and not a limit."""
        return outcome.stopped and self.ended_by is None

    def due_losses(self) -> dict[int, float]:
        """Held-out losses by step, without those that only the end of a command measured.

        An interrupted run and an unbroken one have the same.
        """
        every = self.config.train.validate_every
        return {step: loss for step, loss in self.validation.items() if _due(every, step)}

    def keep_if_best(self, step: int) -> None:
        """Write a checkpoint where train.patience may come back to this step."""
        if self.limits.patience is not None and best_step(self.due_losses()) == step:
            self.checkpoint(step)

    def _restore_best(self, done: int) -> int:
        """With train.patience, bring theta to the step of the lowest held-out loss.

        Returns the step that theta is at.
        """
        losses = self.due_losses() | {done: self.validation.get(done, math.nan)}
        best = None if self.limits.patience is None else best_step(losses)
        if best is None or best == done:
            return done
        folder = checkpoint_folder(self.out.path / "checkpoints", best)
        try:
            checkpoint = read_checkpoint(folder)
            load_checkpoint_(checkpoint, self.components.theta, self.components.optimizer)
        except OutputError as error:
            self.tracker.report(f"warning: final/ holds the last step, not the best: {error.got}")
            return done
        return best

    def after_step(self, steps_done: int) -> None:
        """Compare theta across ranks now and then; do what is due."""
        if _due(all_ranks.CHECK_EVERY, steps_done):
            all_ranks.check_ranks(self.ranks, self.components.theta)
        self.finish_step(steps_done)
        all_ranks.agree_on_end(self.ranks, self.config.train, steps_done)

    def finish_step(self, steps_done: int) -> None:
        """Validate, checkpoint, sample and report where it is due and not done yet."""
        if _due(self.config.train.validate_every, steps_done):
            self.validate(steps_done)
            self.keep_if_best(steps_done)
        if _due(self.config.train.checkpoint_every, steps_done):
            self.checkpoint(steps_done)
        if _due(self.callbacks.every, steps_done):
            self.show(steps_done)
        if _due(self.config.train.validate_every, steps_done) or _due(
            self.callbacks.every, steps_done
        ):
            self.report()

    def validate(self, step: int) -> None:
        """Measure the held-out loss of this step once."""
        if not self.callbacks.held_out or step in self.validation:
            return
        with self.components.scales.override(self.components.theta.perturbed()):
            self.validation[step] = mean_loss(self.components.objective, self.callbacks.held_out)
        self.tracker.on_validation(step, self.validation[step])

    def show(self, step: int) -> None:
        """Make the samples or scores of this step, at theta as it is."""
        with self.components.scales.override(self.components.theta.perturbed()):
            self.callbacks.show(step)

    def checkpoint(self, step: int) -> None:
        """Write a checkpoint unless it exists, and drop old ones."""
        folder = checkpoint_folder(self.out.path / "checkpoints", step)
        if folder.exists():  # a kill may have come after it was written
            drop_old(folder.parent, self.config.train.keep_checkpoints)
            return
        if self.journal is not None:
            self.journal.sync()
        chain = "" if self.journal is None else self.journal.chain
        losses = self.validation if self.limits.patience is None else self.due_losses()
        written = save_checkpoint(
            Checkpoint(folder, step, chain, losses.get(step)),
            self.components.theta,
            self.components.optimizer,
            metadata=self.metadata | {"qzo.steps": str(step)},
            keep=self.config.train.keep_checkpoints,
        )
        if written is None:
            self.tracker.report(
                f"warning: no checkpoint of step {step}: scales are not finite; `replay --to-step` "
                "rebuilds an earlier step"
            )

    def finish(self, step: int) -> None:
        """Write the tuned scales into final/."""
        if self.journal is not None:
            self.journal.sync()
        self.out.save_scales(
            "final", tuned_scales(self.components.theta), self.metadata | {"qzo.steps": str(step)}
        )

    def report(self) -> None:
        """Rewrite the report page; a failure only warns."""
        try:
            usage.record(self.out, next(iter(self.components.scales.tensors().values())).device)
            report_run.write(self.out.path)
        except (OSError, ValueError, UserError) as error:
            self.tracker.report(f"warning: no report: {error}")

    def results(self, outcome: Outcome) -> dict[str, Any]:
        """Return the figures for `--json`."""
        steps = sorted(self.validation)
        last = self.final_step if self.final_step in self.validation else max(steps, default=0)
        peak = devices.peak_bytes(next(iter(self.components.scales.tensors().values())).device)
        return {
            "run": str(self.out.path),
            "steps": outcome.steps_done,
            "max_steps": self.config.train.max_steps,
            "seconds": time.monotonic() - self.started,
            "peak_memory_gb": None if peak is None else peak / 1e9,
            "skipped": outcome.skipped,
            "stopped": self.interrupted(outcome),
            "ended_by": self.ended_by if outcome.stopped else None,
            "final_step": self.final_step,
            "validation_loss": {
                "start": self.validation[steps[0]],
                "end": self.validation[last],
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


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
