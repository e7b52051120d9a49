"""Q-SPSA: the directional derivative of a loss with respect to the trained numbers, from two forward passes.

For a direction z and a radius ε (QZO, arXiv 2505.13430, equation 4; SPSA, Spall 1992):

    d  = (L(θ + ε z; B) - L(θ - ε z; B)) / (2 ε)        same batch B, same noise, same noise levels
    d' = clip(d, -C, C)                                 directional derivative clipping (DDC)

E[d z] is the gradient up to O(ε²). Clipping makes it biased: z and the sign of d correlate.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from qzo_diffusion.core.noise import Direction
from qzo_diffusion.core.parametrize import Parametrization

Batch = TypeVar("Batch")
Objective = Callable[[Batch], Tensor]
"""A micro-batch -> one loss per example, [B]. Its randomness is in the micro-batch, so it can be evaluated twice."""

SumOverRanks = Callable[[Sequence[float]], list[float]]
"""This process's sums -> the sums over all processes that share the batch."""


@dataclass(frozen=True)
class Estimate:
    """One step's estimate. All tuples have one entry per direction; losses are means over the examples of the batch."""

    directions: tuple[Direction, ...]
    loss_plus: tuple[float, ...]
    loss_minus: tuple[float, ...]
    directional_derivative: tuple[float, ...]
    projected_grad: tuple[float, ...]
    clipped: tuple[bool, ...]

    @property
    def loss(self) -> float:
        """The mean of all probes: L(θ) up to O(ε²), without a forward of its own."""
        return (sum(self.loss_plus) + sum(self.loss_minus)) / (2 * len(self.directions))

    @property
    def finite(self) -> bool:
        """False when any probe was NaN or infinite; clipping must not make such a step look sound."""
        return all(map(math.isfinite, self.directional_derivative))


def mean_loss(objective: Objective[Batch], micro_batches: Sequence[Batch]) -> float:
    """The mean over all examples of all micro-batches, exact whatever their sizes; no gradient is recorded."""
    losses = [loss for micro_batch in micro_batches for loss in sample_losses(objective, micro_batch)]
    return math.fsum(losses) / len(losses)


def sample_losses(objective: Objective[Batch], micro_batch: Batch) -> list[float]:
    """One loss per example; no gradient is recorded."""
    with torch.no_grad():
        losses: list[float] = objective(micro_batch).detach().reshape(-1).to("cpu", torch.float64).tolist()
    return losses


def alone(values: Sequence[float]) -> list[float]:
    """The sum over ranks where there is one."""
    return list(values)


def clip_directional_derivative(d: float, clip_threshold: float | None) -> float:
    """DDC. NaN stays NaN, so that the loop can see and skip the step; `min(max())` would hide it."""
    if clip_threshold is None or math.isnan(d):
        return d
    return max(-clip_threshold, min(clip_threshold, d))


def estimate(
    objective: Objective[Batch],
    micro_batches: Sequence[Batch],
    parametrization: Parametrization,
    directions: Sequence[Direction],
    *,
    eps: float,
    clip_threshold: float | None = None,
    sum_over_ranks: SumOverRanks = alone,
) -> Estimate:
    """Two forward passes per direction. The scales are bit for bit what they were, also when `objective` raises.

    Args:
        objective: one loss per example of a micro-batch.
        micro_batches: this process's part of the batch, in parts that fit into memory; losses are averaged before d is formed.
        parametrization: the trained numbers.
        directions: where to probe; their z are averaged in the update.
        eps: ε, the radius of the probe, in the parametrization's units.
        clip_threshold: C of DDC, None for no clipping.
        sum_over_ranks: exchanges one count and two sums per direction, once a step.
    """
    count, sums = 0, list[float]()
    probes = [(direction, radius) for direction in directions for radius in (eps, -eps)]
    with parametrization.scales.attached():
        for direction, radius in probes:
            with parametrization.scales.showing(parametrization.view(direction, radius)):
                losses = [loss for micro_batch in micro_batches for loss in sample_losses(objective, micro_batch)]
            count = len(losses)
            sums.append(math.fsum(losses))
    total, *totals = sum_over_ranks([float(count), *sums])
    means = [value / total for value in totals]
    return _from_losses(directions, means[::2], means[1::2], eps, clip_threshold)


def estimate_per_example(
    objective: Objective[Batch],
    micro_batches: Sequence[Batch],
    parametrization: Parametrization,
    directions: Sequence[Direction],
    *,
    eps: float,
    clip_threshold: float | None = None,
    first_example: int = 0,
    sum_over_ranks: SumOverRanks = alone,
) -> Estimate:
    """Two forward passes in all, with a direction of its own for every example: `directions[i]` belongs to example i of the batch.

    The mean of d_i z_i over B examples has 1/B of the variance that one shared direction leaves, for the same two forwards, because
    factors of outputs can differ within a batch where scales of weights can't. Numbers must be rows or layers.

    Args:
        directions: one for every example of the whole batch, over all processes.
        first_example: where this process's micro-batches begin in it.
    """
    plus, minus = [0.0] * len(directions), [0.0] * len(directions)
    start = first_example
    for micro_batch in micro_batches:
        stop = start + len(micro_batch)  # type: ignore[arg-type]
        for radius, losses in ((eps, plus), (-eps, minus)):
            with parametrization.scales.showing(parametrization.view(), parametrization.gain(directions[start:stop], radius)):
                losses[start:stop] = sample_losses(objective, micro_batch)
        start = stop
    both = sum_over_ranks([*plus, *minus])  # others have zeros where this process has its examples
    return _from_losses(directions, both[: len(plus)], both[len(plus) :], eps, clip_threshold)


def _from_losses(
    directions: Sequence[Direction], plus: list[float], minus: list[float], eps: float, clip_threshold: float | None
) -> Estimate:
    derivatives = [(p - m) / (2 * eps) for p, m in zip(plus, minus, strict=True)]
    projected = [clip_directional_derivative(d, clip_threshold) for d in derivatives]
    clipped = tuple(math.isfinite(d) and d != g for d, g in zip(derivatives, projected, strict=True))
    return Estimate(tuple(directions), tuple(plus), tuple(minus), tuple(derivatives), tuple(projected), clipped)
