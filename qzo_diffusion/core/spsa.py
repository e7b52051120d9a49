"""Q-SPSA: estimate the directional derivatives of a loss with respect to θ by forward passes alone.

For a direction z and a radius ε, on the same batch B with the same noise and noise levels, either
probe both sides (antithetic: QZO, arXiv 2505.13430, equation 4; SPSA, Spall 1992), or probe one
side of K directions and compare each with the mean of the others (RLOO, arXiv 1909.12880):

    d  = (L(θ + ε z; B) - L(θ - ε z; B)) / (2 ε)                       antithetic
    d_k = (L(θ + ε z_k; B) - mean over j ≠ k of L(θ + ε z_j; B)) / ε      leave_one_out
    d' = clip(d, -C, C)                    directional derivative clipping (DDC)
    d' = d' / √(mean d'² over the step's directions)
                                           normalisation, for steps of several directions
                                           (as FZOO, arXiv 2506.09034)

E[d z] is the gradient up to O(ε²) either way (in a `core.subspace` BᵀB times it), since the mean of
the others does not depend on z_k. That mean removes the loss itself and the mean curvature, ε²
tr(H) / 2. So 8 forward passes give 7 effective directions with leave-one-out and 4 with antithetic
probing; the extra noise is ε/2 times the differences of zᵀHz between directions. Clipping makes the
estimate biased: it shrinks large derivatives. Normalised steps have a length that does not depend
on the scale of the loss, so one learning rate suits many models."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from qzo_diffusion.core.noise import Direction, directions_of_step
from qzo_diffusion.core.parametrization import Parametrization
from qzo_diffusion.core.probes import Batch, Objective, Probes, sample_losses
from qzo_diffusion.core.probing import Probing, StepBatch
from qzo_diffusion.core.within_example import ROUNDING, normalised, without_bad

SumOverRanks = Callable[[Sequence[float]], list[float]]
"""This process's sums -> the sums over all processes that share the batch."""


@dataclass(frozen=True)
class Estimate:
    """The directional derivatives of one step, and the losses that they come from.

    All tuples but `directions` have one entry for each patch group of each direction, in that
    order. A loss is the mean over the batch, or belongs to one example or one patch group of it.

    Attributes:
        loss_plus: at +ε.
        loss_minus: at -ε, or the mean of the other directions' loss_plus with leave-one-out.
        directional_derivative: as measured.
        projected_grad: clipped and normalised, as the update takes it.
        clipped: whether clipping changed it.
        left_out: directions that were left out because a loss was not finite.
    """

    directions: tuple[Direction, ...]
    loss_plus: tuple[float, ...]
    loss_minus: tuple[float, ...]
    directional_derivative: tuple[float, ...]
    projected_grad: tuple[float, ...]
    clipped: tuple[bool, ...]
    left_out: int = 0

    @property
    def patch_groups(self) -> int:
        return self.directions[0].patch_groups if self.directions else 1

    @property
    def loss(self) -> float:
        """L(θ) estimated as the mean loss of all probes, without a forward pass of its own.

        The error is O(ε²) with antithetic probing; leave-one-out leaves a first-order term of mean
        zero."""
        return (sum(self.loss_plus) + sum(self.loss_minus)) / (2 * len(self.loss_plus))

    @property
    def finite(self) -> bool:
        """Whether all losses and derivatives are; clipping must not make a bad step look sound."""
        seen = (self.loss_plus, self.loss_minus, self.directional_derivative)
        return all(math.isfinite(value) for values in seen for value in values)


def mean_loss(objective: Objective[Batch], micro_batches: Sequence[Batch]) -> float:
    """The mean loss over all examples of all micro-batches; no gradient is recorded."""
    losses = [
        loss for micro_batch in micro_batches for loss in sample_losses(objective, micro_batch)
    ]
    return exact_sum(losses) / len(losses)


def exact_sum(values: Iterable[float]) -> float:
    """The exact sum, rounded once; NaN or infinite where a value is."""
    kept = list(values)
    try:
        return math.fsum(kept)
    except (ValueError, OverflowError):  # infinities of both signs, or a sum beyond float64
        return sum(kept)


def no_reduce(values: Sequence[float]) -> list[float]:
    """The sums over ranks of a single process: its own."""
    return list(values)


def clip_directional_derivative(d: float, clip_threshold: float | None) -> float:
    """Clip to [-C, C] (DDC). NaN stays NaN, which `min(max())` would hide from the loop."""
    if clip_threshold is None or math.isnan(d):
        return d
    return max(-clip_threshold, min(clip_threshold, d))


def probe(
    objective: Objective[Batch],
    batch: StepBatch[Batch],
    parametrization: Parametrization,
    probing: Probing,
    step: int,
    sum_over_ranks: SumOverRanks = no_reduce,
) -> Estimate:
    """Estimate the derivatives of a step along the directions that follow from (seed, step)."""
    count = probing.num_directions * (batch.whole if probing.per_example else 1)
    directions = directions_of_step(
        probing.seed, step, count, probing.distribution, batch.patch_groups
    )
    return estimate(objective, batch, parametrization, directions, probing, sum_over_ranks)


def estimate(
    objective: Objective[Batch],
    batch: StepBatch[Batch],
    parametrization: Parametrization,
    directions: Sequence[Direction],
    probing: Probing,
    sum_over_ranks: SumOverRanks = no_reduce,
) -> Estimate:
    """Estimate the derivative of a loss along each direction by forward passes alone.

    Antithetic probing makes two forward passes of the batch for each direction, leave-one-out
    makes one. All examples share the directions and the loss is the batch's mean, or each example
    has its own directions and loss (`per_example`): the mean of d_i z_i over B examples has as
    little as 1/B of the variance of one shared direction.
    Where directions have patch groups, token-wise layers are probed for each patch group of each
    example against that group's loss (`core.grouped`). The scales stay bit for bit as they were,
    also when `objective` raises.

    Args:
        objective: one loss for each example of a micro-batch.
        parametrization: what is trained; `per_example` needs one that `scales_activations`.
        directions: shared by all examples; or `directions[i]` for example i of the whole batch,
            the first direction of all examples before the second of any.
        probing: its seed, num_directions and distribution are not read here.
        sum_over_ranks: exchanges a count and one or two sums for each direction, once.

    Raises:
        ValueError: `per_example` without `scales_activations`, or with an objective that gives one
            loss for a whole batch; patch groups without `per_example`; leave-one-out of a single
            direction.
    """
    alike = batch.whole if probing.per_example else 1  # directions that are not compared
    _check(parametrization, directions, probing, alike)
    probes = Probes(objective, parametrization, probing.radii, probing.probes_per_forward)
    if probing.per_example:
        at_radii = _of_each_example(probes, batch, directions, sum_over_ranks)
    else:
        at_radii = _of_shared_directions(probes, batch.micro_batches, directions, sum_over_ranks)
    left_out = [False] * len(at_radii[0])
    if probing.within_example:
        at_radii, left_out = without_bad(at_radii, alike)
    plus = at_radii[0]
    if probing.estimator == "antithetic":
        minus = at_radii[1]
    else:
        minus = _mean_of_others(plus, alike * directions[0].patch_groups)
    found = _from_losses(directions, plus, minus, probing)
    if not probing.within_example:
        return found
    leading = alike if batch.leading is None else batch.leading
    return _within_examples(found, left_out, probing, alike, leading)


def _check(
    parametrization: Parametrization, directions: Sequence[Direction], probing: Probing, alike: int
) -> None:
    """Raises ValueError for directions that can't be probed so."""
    if probing.per_example and not parametrization.scales_activations:
        raise ValueError(
            "this parametrization does not scale activations, without which examples can't have "
            "directions of their own; use rows or layers"
        )
    if probing.estimator == "leave_one_out" and len(directions) < 2 * alike:
        raise ValueError(
            "leave_one_out compares the directions of an example with each other: it needs two or "
            "more of them"
        )
    if directions[0].patch_groups > 1 and not probing.per_example:
        raise ValueError("patch groups have directions of their own only where examples have")
    if probing.within_example and (not probing.per_example or directions[0].patch_groups > 1):
        raise ValueError("within_example needs per_example and one loss for each example")


def _of_each_example(
    probes: Probes[Batch],
    batch: StepBatch[Batch],
    directions: Sequence[Direction],
    sum_over_ranks: SumOverRanks,
) -> list[list[float]]:
    """Losses of all processes, [radius][directions · examples · patch groups]."""
    patch_groups, examples = directions[0].patch_groups, batch.whole
    found = [[0.0] * (len(directions) * patch_groups) for _ in probes.radii]
    start = batch.first_example
    for micro_batch in batch.micro_batches:
        size = len(micro_batch)  # type: ignore[arg-type]
        places = range(start, len(directions), examples)
        probed = probes.losses(micro_batch, [directions[at : at + size] for at in places])
        for of_radius, at_radius in zip(found, probed, strict=True):
            for at, losses in zip(places, at_radius, strict=True):
                if len(losses) != size * patch_groups:
                    raise ValueError(
                        f"{len(losses)} losses for {size} examples of {patch_groups} patch groups: "
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
    """Mean losses [radius][direction] over the batch of all processes."""
    parts = [
        probes.losses(micro_batch, [[direction] for direction in directions])
        for micro_batch in micro_batches
    ]
    count = sum(len(part[0][0]) for part in parts)
    sums = [
        exact_sum(loss for part in parts for loss in part[radius][index])
        for radius in range(len(probes.radii))
        for index in range(len(directions))
    ]
    total, *sums = sum_over_ranks([float(count), *sums])
    means = [value / total for value in sums]
    return [means[i : i + len(directions)] for i in range(0, len(means), len(directions))]


def _mean_of_others(losses: Sequence[float], stride: int) -> list[float]:
    """Return for each loss the mean of the others that lie whole multiples of `stride` from it."""
    sums = [exact_sum(losses[place::stride]) for place in range(stride)]
    others = len(losses) // stride - 1
    return [(sums[index % stride] - loss) / others for index, loss in enumerate(losses)]


def over_patch_groups(values: Sequence[float], patch_groups: int) -> list[float]:
    """The mean over the patch groups of each direction."""
    return [
        exact_sum(values[i : i + patch_groups]) / patch_groups
        for i in range(0, len(values), patch_groups)
    ]


def rms(derivatives: Sequence[float], patch_groups: int = 1) -> float:
    """√(mean d²) over directions; d of a direction is the mean over its patch groups."""
    of_direction = over_patch_groups(derivatives, patch_groups)
    return math.sqrt(exact_sum(d * d for d in of_direction) / len(of_direction))


def _from_losses(
    directions: Sequence[Direction],
    plus: list[float],
    minus: list[float],
    probing: Probing,
) -> Estimate:
    """Differences of losses, divided by their distance, clipped and normalised."""
    distance = 2 * probing.eps if probing.estimator == "antithetic" else probing.eps
    derivatives = [(p - m) / distance for p, m in zip(plus, minus, strict=True)]
    projected = [clip_directional_derivative(d, probing.clip_threshold) for d in derivatives]
    clipped = tuple(
        math.isfinite(d) and d != g for d, g in zip(derivatives, projected, strict=True)
    )
    if probing.normalize:
        unit = rms(projected, directions[0].patch_groups) or 1.0  # all zero: they stay so
        projected = [g / unit for g in projected]
    return Estimate(
        tuple(directions),
        tuple(plus),
        tuple(minus),
        tuple(derivatives),
        tuple(projected),
        clipped,
    )


def _within_examples(
    found: Estimate, left_out: Sequence[bool], probing: Probing, examples: int, leading: int
) -> Estimate:
    """Divide the derivatives of an estimate by the rms of their own example."""
    measured = zip(found.directional_derivative, left_out, strict=True)
    derivatives = [0.0 if out else d for d, out in measured]
    clipped = [clip_directional_derivative(d, probing.clip_threshold) for d in derivatives]
    smallest = ROUNDING * max(map(abs, found.loss_plus)) / probing.eps
    projected = normalised(clipped, smallest, examples, leading)
    if probing.normalize:
        unit = rms(projected) or 1.0
        projected = [g / unit for g in projected]
    return replace(
        found,
        directional_derivative=tuple(derivatives),
        projected_grad=tuple(projected),
        left_out=sum(left_out),
    )
