"""Q-SPSA: the directional derivative of a loss with respect to the trained numbers, from forward
passes alone.

For a direction z and a radius ε, on the same batch B, the same noise and the same noise levels,
antithetic probes (QZO, arXiv 2505.13430, equation 4; SPSA, Spall 1992), or K directions with a
probe each, every one beside the mean of the others (as REINFORCE leave-one-out, arXiv 1909.12880):

    d  = (L(θ + ε z; B) - L(θ - ε z; B)) / (2 ε)                       antithetic
    d_k = (L(θ + ε z_k; B) - mean over j ≠ k of L(θ + ε z_j; B)) / ε      leave_one_out
    d' = clip(d, -C, C)                    directional derivative clipping (DDC)
    d' = d / √(mean d² over the step's directions)
                                           normalisation, for steps of several directions
                                           (as FZOO, arXiv 2506.09034)

E[d z] is the gradient up to O(ε²) either way: the others' mean does not depend on z_k. It takes out
the loss itself and the curvature's mean, ε² tr(H) / 2, so that of K forwards K - 1 count as
directions, where antithetic probes make K / 2 of them; what it adds to the noise is ε/2 times what
zᵀHz differs by between directions. Clipping makes the estimate biased: z and the sign of d
correlate. Normalising gives steps a length that does not depend on the scale of the loss, so one
learning rate suits many models."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from qzo_diffusion.core.noise import Direction
from qzo_diffusion.core.parametrization import Parametrization
from qzo_diffusion.core.probes import Batch, Objective, Probes, sample_losses

Estimator = Literal["antithetic", "leave_one_out"]

SumOverRanks = Callable[[Sequence[float]], list[float]]
"""This process's sums -> the sums over all processes that share the batch."""


@dataclass(frozen=True)
class Estimate:
    """One step's estimate. Losses are means over the examples of the batch, or of one example, or
    of a region of one.

    All tuples but `directions` have one entry for each region of each direction, in that order.
    loss_minus: what loss_plus is set against, the loss at -ε or the mean of the other directions'
    loss_plus. independent: how many directions the noise is that of; all of them, or K - 1 of every
    K that are set against each other."""

    directions: tuple[Direction, ...]
    loss_plus: tuple[float, ...]
    loss_minus: tuple[float, ...]
    directional_derivative: tuple[float, ...]
    projected_grad: tuple[float, ...]
    clipped: tuple[bool, ...]
    independent: float

    @property
    def loss(self) -> float:
        """The mean of all probes: L(θ) up to O(ε²), without a forward of its own."""
        return (sum(self.loss_plus) + sum(self.loss_minus)) / (2 * len(self.loss_plus))

    @property
    def finite(self) -> bool:
        """False when any probe was NaN or infinite; clipping must not make such a step look
        sound.
        """
        return all(map(math.isfinite, self.directional_derivative))


def mean_loss(objective: Objective[Batch], micro_batches: Sequence[Batch]) -> float:
    """The mean over all examples of all micro-batches, exact whatever their sizes; no gradient is
    recorded.
    """
    losses = [
        loss for micro_batch in micro_batches for loss in sample_losses(objective, micro_batch)
    ]
    return math.fsum(losses) / len(losses)


def no_reduce(values: Sequence[float]) -> list[float]:
    """The sum over ranks where there is one."""
    return list(values)


def clip_directional_derivative(d: float, clip_threshold: float | None) -> float:
    """DDC. NaN stays NaN, so that the loop can see and skip the step; `min(max())` would hide
    it.
    """
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
    estimator: Estimator = "antithetic",
    per_example: bool = False,
    probes_per_forward: int | None = None,
    clip_threshold: float | None = None,
    normalize: bool = False,
    first_example: int = 0,
    examples: int | None = None,
    sum_over_ranks: SumOverRanks = no_reduce,
) -> Estimate:
    """Two forward passes of the batch per direction, or one with `leave_one_out`; shared by all
    examples, or each along its own.

    The mean of d_i z_i over B examples with directions of their own has up to 1/B of the variance
    that one shared direction leaves, for the same two forwards. It needs numbers that are factors
    of inputs and outputs (`scales_activations`); those can also run several probes in one forward
    of so many copies of the batch, which reads and dequantizes the weights once. Where directions
    have regions, the numbers of pointwise layers are probed once more by each region of each
    example, against that region's loss (`core.grouped`). The scales are bit for bit what they were,
    also when `objective` raises.

    Args:
        objective: one loss per example of a micro-batch.
        micro_batches: this process's part of the batch, in parts that fit into memory.
        parametrization: the trained numbers.
        directions: where to probe: shared by all examples, or `directions[i]` for example i of the
            whole batch over all processes; where examples have several, all of them have their
            first, and then all their next.
        eps: ε, the radius of the probe, in the parametrization's units.
        copies: the most probes of a micro-batch in one forward, where the numbers and the batch
            allow several; None is all.
        clip_threshold: C of DDC, None for no clipping.
        normalize: divide the derivatives by their spread; a step of one direction would keep
            nothing but its sign.
        first_example: where this process's micro-batches begin in the whole batch.
        examples: of the whole batch, for `per_example`; None is as many as directions.
        sum_over_ranks: exchanges a count and one or two sums per direction, once a step.

    Raises:
        ValueError: `per_example` with numbers that have no gains, or an objective that gives one
            loss for a whole batch; regions without `per_example`; `leave_one_out` of a single
            direction.
    """
    if per_example and not parametrization.scales_activations:
        raise ValueError(
            "these numbers have no factors, which alone can give every example its own direction; "
            "use rows or layers"
        )
    patch_groups, alike = (
        directions[0].patch_groups,
        (examples or len(directions)) if per_example else 1,
    )
    if estimator == "leave_one_out" and len(directions) < 2 * alike:
        raise ValueError(
            "leave_one_out sets a direction against others of the same examples: it needs two or "
            "more of them"
        )
    if patch_groups > 1 and not per_example:
        raise ValueError("regions have directions of their own only where examples have")
    probes = Probes(
        objective,
        parametrization,
        (eps, -eps) if estimator == "antithetic" else (eps,),
        probes_per_forward,
    )
    if per_example:
        at_radii = _of_each_example(
            probes, micro_batches, directions, first_example, alike, sum_over_ranks
        )
    else:
        at_radii = _of_shared_directions(probes, micro_batches, directions, sum_over_ranks)
    plus = at_radii[0]
    minus = (
        at_radii[1] if estimator == "antithetic" else _mean_of_others(plus, alike * patch_groups)
    )
    distance, counted = (
        (2 * eps, 1.0) if estimator == "antithetic" else (eps, 1 - alike / len(directions))
    )
    return _from_losses(
        directions, plus, minus, distance, clip_threshold, normalize, counted * len(plus)
    )


def _of_each_example(
    probes: Probes[Batch],
    micro_batches: Sequence[Batch],
    directions: Sequence[Direction],
    first_example: int,
    examples: int,
    sum_over_ranks: SumOverRanks,
) -> list[list[float]]:
    """For each radius the loss of each region of each direction."""
    patch_groups = directions[0].patch_groups
    found = [[0.0] * (len(directions) * patch_groups) for _ in probes.radii]
    start = first_example
    for micro_batch in micro_batches:
        size = len(micro_batch)  # type: ignore[arg-type]
        places = range(start, len(directions), examples)
        probed = probes.losses(micro_batch, [directions[at : at + size] for at in places])
        for of_radius, at_radius in zip(found, probed, strict=True):
            for at, losses in zip(places, at_radius, strict=True):
                if len(losses) != size * patch_groups:
                    raise ValueError(
                        f"{len(losses)} losses for {size} examples of {patch_groups} regions: "
                        "per_example needs one loss for each"
                    )
                of_radius[at * patch_groups : (at + size) * patch_groups] = losses
        start += size
    # others have zeros where this process has its own
    flat = sum_over_ranks([loss for of_radius in found for loss in of_radius])
    return [flat[i : i + len(found[0])] for i in range(0, len(flat), len(found[0]))]


def _of_shared_directions(
    probes: Probes[Batch],
    micro_batches: Sequence[Batch],
    directions: Sequence[Direction],
    sum_over_ranks: SumOverRanks,
) -> list[list[float]]:
    """For each radius the mean loss along each direction."""
    parts = [
        probes.losses(micro_batch, [[direction] for direction in directions])
        for micro_batch in micro_batches
    ]
    count = sum(len(part[0][0]) for part in parts)
    sums = [
        math.fsum(loss for part in parts for loss in part[radius][index])
        for radius in range(len(probes.radii))
        for index in range(len(directions))
    ]
    total, *sums = sum_over_ranks([float(count), *sums])
    means = [value / total for value in sums]
    return [means[i : i + len(directions)] for i in range(0, len(means), len(directions))]


def _mean_of_others(losses: Sequence[float], stride: int) -> list[float]:
    """Beside each loss the mean of those that lie whole multiples of `apart` from it."""
    sums = [math.fsum(losses[place::stride]) for place in range(stride)]
    others = len(losses) // stride - 1
    return [(sums[index % stride] - loss) / others for index, loss in enumerate(losses)]


def over_patch_groups(values: Sequence[float], patch_groups: int) -> list[float]:
    """The mean over the regions of each direction."""
    return [
        math.fsum(values[i : i + patch_groups]) / patch_groups
        for i in range(0, len(values), patch_groups)
    ]


def rms(derivatives: Sequence[float], patch_groups: int = 1) -> float:
    """√(mean d²) over directions; d of a direction is the mean over its regions."""
    of_direction = over_patch_groups(derivatives, patch_groups)
    return math.sqrt(math.fsum(d * d for d in of_direction) / len(of_direction))


def _from_losses(
    directions: Sequence[Direction],
    plus: list[float],
    minus: list[float],
    distance: float,
    clip_threshold: float | None,
    normalize: bool,
    independent: float,
) -> Estimate:
    derivatives = [(p - m) / distance for p, m in zip(plus, minus, strict=True)]
    projected = [clip_directional_derivative(d, clip_threshold) for d in derivatives]
    clipped = tuple(
        math.isfinite(d) and d != g for d, g in zip(derivatives, projected, strict=True)
    )
    if normalize:
        unit = rms(projected, directions[0].patch_groups) or 1.0  # all zero: they stay so
        projected = [g / unit for g in projected]
    return Estimate(
        tuple(directions),
        tuple(plus),
        tuple(minus),
        tuple(derivatives),
        tuple(projected),
        clipped,
        independent,
    )
