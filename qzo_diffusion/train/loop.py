"""The training loop, for diffusion, language models and anything else: it knows an objective, not
what is behind it.

One step: draw the batch, probe it along each direction, clip, update. Everything random in step t
follows from (seed, t), so the loop carries no random state.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, Protocol

from qzo_diffusion.core.errors import TrainingDiverged
from qzo_diffusion.core.noise import Distribution, directions_of_step
from qzo_diffusion.core.optimizer import Optimizer, Schedule, Update
from qzo_diffusion.core.parametrization import Parametrization
from qzo_diffusion.core.probes import Batch, Objective
from qzo_diffusion.core.spsa import (
    Estimate,
    Estimator,
    SumOverRanks,
    estimate,
    no_reduce,
    over_patch_groups,
)

MAX_BAD_STEPS = 10  # in a row; then the run stops


@dataclass(frozen=True)
class StepRecord:
    """One line of metrics.jsonl: with several directions, lists, in which the regions of a
    direction are averaged.

    clipped: with several directions or regions a fraction. applied: the scalar of every region of
    every direction, as the update took them and the journal keeps them; too many for a line.
    """

    step: int
    loss_plus: float | list[float]
    loss_minus: float | list[float]
    loss: float
    directional_derivative: float | list[float]
    projected_grad: float | list[float]
    lr: float
    eps: float
    clipped: bool | float
    skipped: bool
    sigma_mean: float | None
    seconds: float
    applied: tuple[float, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """What metrics.jsonl holds."""
        line = asdict(self)
        del line["applied"]
        return line


@dataclass(frozen=True)
class StepBatch(Generic[Batch]):
    """This process's micro-batches of one step, which begin at `first_example` of the whole batch
    of `examples`.

    Without `examples` they are the whole batch. `sigma_mean` is the mean noise level for objectives
    that have one. `regions` is how many losses the objective gives for an example; with more than
    one, every region is probed along a direction of its own."""

    micro_batches: Sequence[Batch]
    sigma_mean: float | None = None
    first_example: int = 0
    examples: int | None = None
    patch_groups: int = 1

    @property
    def whole(self) -> int:
        """Examples of the whole batch."""
        return sum(map(len, self.micro_batches)) if self.examples is None else self.examples  # type: ignore[arg-type]


@dataclass(frozen=True)
class Probing:
    """How a step probes: radius, directions, clipping, and the seed of the run."""

    seed: int
    eps: float
    num_directions: int = 1
    per_example: bool = False  # directions of its own for every example, num_directions each
    distribution: Distribution = "rademacher"
    clip_threshold: float | None = None
    normalize: bool = False
    # the most probes of a batch in one forward, where the numbers allow several; None: all of them
    probes_per_forward: int | None = None
    estimator: Estimator = "antithetic"


class TakeStep(Protocol):
    """One whole step. `train_step_` is it, unless what is trained has a gradient that is to be used
    (`train.first_order`).
    """

    def __call__(
        self,
        objective: Objective[Any],
        batch: StepBatch[Any],
        parametrization: Parametrization,
        optimizer: Any,
        probing: Probing,
        lr: float,
        step: int,
        sum_over_ranks: SumOverRanks = no_reduce,
    ) -> StepRecord: ...


@dataclass(frozen=True)
class Outcome:
    """steps_done counts from 0 over the whole run; `stopped` is True when it was asked to end
    early.
    """

    steps_done: int
    skipped: int
    stopped: bool


def train(
    objective: Objective[Batch],
    batch_of_step: Callable[[int], StepBatch[Batch]],
    parametrization: Parametrization,
    optimizer: Any,
    probing: Probing,
    schedule: Schedule,
    *,
    max_steps: int,
    first_step: int = 0,
    bad_steps_before: int = 0,
    on_step: Callable[[StepRecord], None] = lambda record: None,
    after_step: Callable[[int], None] = lambda steps_done: None,
    stop_requested: Callable[[], bool] = lambda: False,
    sum_over_ranks: SumOverRanks = no_reduce,
    take_step: TakeStep | None = None,
) -> Outcome:
    """Run steps `first_step` .. `max_steps - 1`.

    A step whose loss is NaN or infinite changes nothing: it is recorded as skipped and counted.

    Args:
        bad_steps_before: how many skipped steps in a row come before `first_step`.
        on_step: receives the record of every step.
        after_step: called with the number of steps done, for samples, validation and checkpoints.
        stop_requested: asked between steps; True ends the run after the step in hand.
        take_step: None is `train_step_`.

    Raises:
        TrainingDiverged: ten steps in a row were skipped.
    """
    skipped, bad_in_a_row = 0, bad_steps_before
    for step in range(first_step, max_steps):
        if stop_requested():
            return Outcome(step, skipped, stopped=True)
        batch = batch_of_step(step)
        record = (take_step or train_step_)(
            objective,
            batch,
            parametrization,
            optimizer,
            probing,
            schedule(step),
            step,
            sum_over_ranks,
        )
        bad_in_a_row = bad_in_a_row + 1 if record.skipped else 0
        skipped += record.skipped
        on_step(record)
        if bad_in_a_row >= MAX_BAD_STEPS:
            raise TrainingDiverged(
                f"{MAX_BAD_STEPS} steps in a row with a loss that is NaN or infinite, the "
                f"last at step {step}",
                "a finite loss",
                "lower train.lr or qzo.eps, set qzo.clip_threshold, or use compute.dtype=float32; "
                "the scales of the last good step were saved",
            )
        after_step(step + 1)
    return Outcome(max(first_step, max_steps), skipped, stopped=False)


def train_step_(
    objective: Objective[Batch],
    batch: StepBatch[Batch],
    parametrization: Parametrization,
    optimizer: Optimizer,
    probing: Probing,
    lr: float,
    step: int,
    sum_over_ranks: SumOverRanks = no_reduce,
) -> StepRecord:
    """One whole step: estimate, then update."""
    started = time.perf_counter()
    result = probe(objective, batch, parametrization, probing, step, sum_over_ranks)
    if result.finite:
        optimizer.step_(parametrization, Update(result.directions, result.projected_grad, lr))
    return _record(step, result, probing, lr, batch.sigma_mean, time.perf_counter() - started)


def probe(
    objective: Objective[Batch],
    batch: StepBatch[Batch],
    parametrization: Parametrization,
    probing: Probing,
    step: int,
    sum_over_ranks: SumOverRanks = no_reduce,
) -> Estimate:
    """The estimate of a step, along the directions that follow from (seed, step).

    Nothing is changed.
    """
    count, examples = probing.num_directions, None
    if probing.per_example:
        examples = batch.whole
        count *= examples
    return estimate(
        objective,
        batch.micro_batches,
        parametrization,
        directions_of_step(probing.seed, step, count, probing.distribution, batch.patch_groups),
        eps=probing.eps,
        per_example=probing.per_example,
        probes_per_forward=probing.probes_per_forward,
        estimator=probing.estimator,
        clip_threshold=probing.clip_threshold,
        normalize=probing.normalize,
        first_example=batch.first_example,
        examples=examples,
        sum_over_ranks=sum_over_ranks,
    )


def _record(
    step: int,
    result: Estimate,
    probing: Probing,
    lr: float,
    sigma_mean: float | None,
    seconds: float,
) -> StepRecord:
    patch_groups = result.directions[0].patch_groups

    def one_or_list(values: tuple[float, ...]) -> float | list[float]:
        of_direction = over_patch_groups(values, patch_groups)
        return of_direction[0] if len(of_direction) == 1 else of_direction

    return StepRecord(
        step=step,
        loss_plus=one_or_list(result.loss_plus),
        loss_minus=one_or_list(result.loss_minus),
        loss=result.loss,
        directional_derivative=one_or_list(result.directional_derivative),
        projected_grad=one_or_list(result.projected_grad),
        lr=lr,
        eps=probing.eps,
        clipped=result.clipped[0]
        if len(result.clipped) == 1
        else sum(result.clipped) / len(result.clipped),
        skipped=not result.finite,
        sigma_mean=sigma_mean,
        seconds=seconds,
        applied=result.projected_grad,
    )
