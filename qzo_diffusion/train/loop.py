"""The training loop, the same for diffusion and language models: it knows an objective, not the
model behind it.

One step draws its batch, probes it, and updates. Everything random in a step follows from
(seed, step), so the loop keeps no random state."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic

from qzo_diffusion.core.errors import TrainingDiverged
from qzo_diffusion.core.optimizer import Schedule, Update
from qzo_diffusion.core.parametrization import Parametrization
from qzo_diffusion.core.probes import Batch, Objective
from qzo_diffusion.core.probing import Probing, StepBatch
from qzo_diffusion.core.spsa import (
    Estimate,
    SumOverRanks,
    exact_sum,
    no_reduce,
    over_patch_groups,
    probe,
    rms,
)

MAX_BAD_STEPS = 10  # in a row; then the run stops


@dataclass(frozen=True)
class StepRecord:
    """One step that was done, for metrics.jsonl and the journal."""

    step: int
    estimate: Estimate
    lr: float
    eps: float
    sigma_mean: float | None
    seconds: float

    @property
    def loss(self) -> float:
        return self.estimate.loss

    @property
    def skipped(self) -> bool:
        """Whether nothing was updated, because a loss was NaN or infinite."""
        return not self.estimate.finite

    @property
    def clipped(self) -> bool | float:
        """Whether the derivative was clipped; of several, the fraction that was."""
        clipped = self.estimate.clipped
        return clipped[0] if len(clipped) == 1 else sum(clipped) / len(clipped)

    @property
    def directional_derivative(self) -> float:
        """The measured derivative; the rms over several directions."""
        return _of_all(self.estimate.directional_derivative, self.estimate.patch_groups)

    @property
    def projected_grad(self) -> float:
        """The derivative as the update took it; the rms over several directions."""
        return _of_all(self.estimate.projected_grad, self.estimate.patch_groups)

    def as_dict(self) -> dict[str, Any]:
        """A line of metrics.jsonl: one number for each key.

        The journal has the scalar of every direction.
        """
        return {
            "step": self.step,
            "loss_plus": _mean(self.estimate.loss_plus),
            "loss_minus": _mean(self.estimate.loss_minus),
            "loss": self.loss,
            "directional_derivative": self.directional_derivative,
            "projected_grad": self.projected_grad,
            "lr": self.lr,
            "eps": self.eps,
            "clipped": self.clipped,
            "skipped": self.skipped,
            "sigma_mean": self.sigma_mean,
            "seconds": self.seconds,
        } | ({"left_out": self.estimate.left_out} if self.estimate.left_out else {})


def _mean(values: tuple[float, ...]) -> float:
    return exact_sum(values) / len(values)


def _of_all(derivatives: tuple[float, ...], patch_groups: int) -> float:
    """The derivative of one direction with its sign, or the rms over several."""
    of_direction = over_patch_groups(derivatives, patch_groups)
    return of_direction[0] if len(of_direction) == 1 else rms(of_direction)


@dataclass(frozen=True)
class Setup(Generic[Batch]):
    """Everything that the steps of a run have in common.

    Args:
        batch_of_step: the batch of a step, counted from 0.
        optimizer: `core.optimizer.Optimizer`, or what `take_step` uses in its place.
        take_step: one whole step; None is `train_step_`.
    """

    objective: Objective[Batch]
    batch_of_step: Callable[[int], StepBatch[Batch]]
    parametrization: Parametrization
    optimizer: Any
    probing: Probing
    schedule: Schedule
    sum_over_ranks: SumOverRanks = no_reduce
    take_step: "TakeStep | None" = None


class StepGivenUp(Exception):
    """`take_step` raises this to end the run before the step has changed θ."""


TakeStep = Callable[[Setup[Any], StepBatch[Any], int], StepRecord]
"""Setup, batch and number of a step -> its record, once everything is updated."""


@dataclass(frozen=True)
class Outcome:
    """The end of a run.

    Attributes:
        steps_done: steps completed since the run began, those of earlier processes included.
        skipped: steps of this process that changed nothing.
        stopped: whether it was asked to end early.
    """

    steps_done: int
    skipped: int
    stopped: bool


def train(
    setup: Setup[Batch],
    *,
    max_steps: int,
    first_step: int = 0,
    bad_steps_before: int = 0,
    on_step: Callable[[StepRecord], None] = lambda record: None,
    after_step: Callable[[int], None] = lambda steps_done: None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Run steps `first_step` .. `max_steps - 1`.

    A step whose loss is NaN or infinite changes nothing: it is recorded as skipped and counted.

    Args:
        bad_steps_before: how many skipped steps in a row come before `first_step`.
        on_step: receives the record of every step.
        after_step: called with the number of steps done, for samples, validation and checkpoints.
        stop_requested: asked between steps; True ends the run after the step in hand.

    Raises:
        TrainingDiverged: ten steps in a row were skipped.
    """
    skipped, bad_in_a_row = 0, bad_steps_before
    try:
        for step in range(first_step, max_steps):
            if stop_requested():
                return Outcome(step, skipped, stopped=True)
            batch = setup.batch_of_step(step)
            try:
                record = (setup.take_step or train_step_)(setup, batch, step)
            except StepGivenUp:
                return Outcome(step, skipped, stopped=True)
            bad_in_a_row = bad_in_a_row + 1 if record.skipped else 0
            skipped += record.skipped
            on_step(record)
            if bad_in_a_row >= MAX_BAD_STEPS:
                raise _diverged(step)
            after_step(step + 1)
    finally:  # an interrupt may have come where no `with` could end its override
        setup.parametrization.scales.close()
    return Outcome(max(first_step, max_steps), skipped, stopped=False)


def _diverged(step: int) -> TrainingDiverged:
    return TrainingDiverged(
        f"{MAX_BAD_STEPS} steps in a row with a loss that is NaN or infinite, the last at step "
        f"{step}",
        "a finite loss",
        "lower train.lr or qzo.eps, set qzo.clip_threshold, or use compute.dtype=float32; the "
        "scales after the last step with a finite loss were saved",
    )


def train_step_(setup: Setup[Batch], batch: StepBatch[Batch], step: int) -> StepRecord:
    """Estimate, then update: one whole step."""
    started = time.perf_counter()
    lr, theta = setup.schedule(step), setup.parametrization
    found = probe(setup.objective, batch, theta, setup.probing, step, setup.sum_over_ranks)
    if found.finite:
        setup.optimizer.step_(theta, Update(found.directions, found.projected_grad, lr))
    seconds = time.perf_counter() - started
    return StepRecord(step, found, lr, setup.probing.eps, batch.sigma_mean, seconds)
