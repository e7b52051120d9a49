"""Warn early of a run whose estimates carry no signal: its loss curve would not show that for long.

Does an estimate ĝ of one batch hold for the next batch, which has other pictures and other noise?
For the first steps the slope of the next batch along ĝ is measured,

    x = (L(θ + ε u) - L(θ - ε u)) / (2 ε),   u = ĝ √D / |ĝ|,

on both sides, by two more forward passes of a batch. u is as long as a random direction. Of pure
noise x has a mean of about zero, or below it where the step went uphill along a curved loss; a
gradient that batches share makes it positive. The statistic is Student's t of the mean of x over
the steps.

`LIMIT` is the 95 % point of t for pure noise: of such runs 95 % are warned. A run with signal is
warned by mistake where t stays below it. With the mean of x m times its deviation, that has a
chance of about Φ(LIMIT - 4 m) over 16 steps: 1 % at m = 1.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from qzo_diffusion.core.grouped import Grouped
from qzo_diffusion.core.optimizer import Update, gradient_of
from qzo_diffusion.core.probes import sample_losses
from qzo_diffusion.core.probing import StepBatch
from qzo_diffusion.core.spsa import Estimate, exact_sum
from qzo_diffusion.train.loop import Setup, StepRecord, train_step_

CHECKED = 16  # slopes, of the steps 1 .. 16
LIMIT = 1.753  # the 95 % point of Student's t with 15 degrees of freedom


def can_be_checked(setup: Setup[Any]) -> bool:
    """Whether 16 steps are enough to see a signal: each needs more directions than a few, and an
    estimate that can be followed without rounding it. In a subspace 16 steps pass the bottom of its
    steepest directions, and slopes along them change their sign.
    """
    theta = setup.parametrization
    if not isinstance(theta, Grouped) or theta.rounds or theta.in_subspace:
        return False
    return setup.probing.per_example


class EarlySignal:
    """`Setup.take_step` of a run that begins: the usual step, watched for its first steps.

    Nothing of the run changes: θ, its journal and its random numbers stay as they are.

    Args:
        warn: takes the line to show, at most once.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._slopes: list[float] = []
        self._last: Estimate | None = None
        self._done = False

    def __call__(self, setup: Setup[Any], batch: StepBatch[Any], step: int) -> StepRecord:
        if self._last is not None and not self._done:
            self._slopes.append(slope_along(self._last, setup, batch))
            self._finish()
        record = train_step_(setup, batch, step)
        self._last = None if self._done or record.skipped else record.estimate
        return record

    def _finish(self) -> None:
        if len(self._slopes) < CHECKED:
            return
        self._done = True
        found = t_statistic(self._slopes)
        if not found >= LIMIT:  # NaN too
            self._warn(warning(found))


def slope_along(estimate: Estimate, setup: Setup[Any], batch: StepBatch[Any]) -> float:
    """The slope of the batch's mean loss along an estimate of another batch, in units of the slope
    along a random direction; zero for an estimate of zeros."""
    theta, eps = setup.parametrization, setup.probing.eps
    assert isinstance(theta, Grouped)
    update = Update(estimate.directions, estimate.projected_grad, lr=1.0)
    vectors = {name: gradient_of(theta, update, name) for name in theta.templates()}
    length = math.sqrt(
        math.fsum(float(one.double().square().mean()) * one.numel() for one in vectors.values())
    )
    if not length:
        return 0.0
    numbers = sum(one.numel() for one in vectors.values())
    ends = [
        _loss_at(radius * math.sqrt(numbers) / length, vectors, setup, batch)
        for radius in (eps, -eps)
    ]
    return (ends[0] - ends[1]) / (2 * eps)


def _loss_at(
    amount: float, vectors: dict[str, Tensor], setup: Setup[Any], batch: StepBatch[Any]
) -> float:
    """The mean loss over the batch of all processes at θ + amount · vector."""
    theta = setup.parametrization
    assert isinstance(theta, Grouped)
    moved = {name: one * amount for name, one in vectors.items()}
    with theta.scales.override(theta.shifted(moved)):
        losses = [
            loss for part in batch.micro_batches for loss in sample_losses(setup.objective, part)
        ]
    total, count = setup.sum_over_ranks([exact_sum(losses), float(len(losses))])
    return total / count


def t_statistic(values: Sequence[float]) -> float:
    """Student's t of the mean of two or more values; NaN for an infinite one, or all the same."""
    if not all(map(math.isfinite, values)):
        return math.nan
    deviation = statistics.stdev(values)
    return (
        statistics.fmean(values) / (deviation / math.sqrt(len(values))) if deviation else math.nan
    )


def warning(found: float) -> str:
    """One line for a person."""
    return (
        f"warning: the estimate carries no signal that {CHECKED} steps could show: along it the "
        f"loss of the next batch does not rise for certain (t = {found:.1f}, {LIMIT:.1f} is "
        "expected); raise data.batch_size or qzo.eps, or compute in float32"
    )
