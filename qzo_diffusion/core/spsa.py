"""Q-SPSA: the directional derivative of a loss with respect to the trained numbers, from two forward passes.

For a direction z and a radius ε (QZO, arXiv 2505.13430, equation 4; SPSA, Spall 1992):

    d  = (L(θ + ε z; B) - L(θ - ε z; B)) / (2 ε)        same batch B, same noise, same noise levels
    d' = clip(d, -C, C)                                 directional derivative clipping (DDC)
    d' = d / √(mean d² over the step's directions)      normalisation, for steps of several directions (as FZOO, arXiv 2506.09034)

E[d z] is the gradient up to O(ε²). Clipping makes it biased: z and the sign of d correlate. Normalising gives steps a length that
does not depend on the scale of the loss, so one learning rate suits many models.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from qzo_diffusion.core.noise import Direction
from qzo_diffusion.core.parametrization import Parametrization

Batch = TypeVar("Batch")
Objective = Callable[[Batch], Tensor]
"""A micro-batch -> one loss per example, [B], or one per region of each example, [B, R]; the mean over regions is the example's.

Its randomness is in the micro-batch, so it can be evaluated twice.
"""

SumOverRanks = Callable[[Sequence[float]], list[float]]
"""This process's sums -> the sums over all processes that share the batch."""


@dataclass(frozen=True)
class Estimate:
    """One step's estimate. Losses are means over the examples of the batch, or of one example, or of a region of one.

    All tuples but `directions` have one entry for each region of each direction, in that order.
    """

    directions: tuple[Direction, ...]
    loss_plus: tuple[float, ...]
    loss_minus: tuple[float, ...]
    directional_derivative: tuple[float, ...]
    projected_grad: tuple[float, ...]
    clipped: tuple[bool, ...]

    @property
    def loss(self) -> float:
        """The mean of all probes: L(θ) up to O(ε²), without a forward of its own."""
        return (sum(self.loss_plus) + sum(self.loss_minus)) / (2 * len(self.loss_plus))

    @property
    def finite(self) -> bool:
        """False when any probe was NaN or infinite; clipping must not make such a step look sound."""
        return all(map(math.isfinite, self.directional_derivative))


def mean_loss(objective: Objective[Batch], micro_batches: Sequence[Batch]) -> float:
    """The mean over all examples of all micro-batches, exact whatever their sizes; no gradient is recorded."""
    losses = [loss for micro_batch in micro_batches for loss in sample_losses(objective, micro_batch)]
    return math.fsum(losses) / len(losses)


def sample_losses(objective: Objective[Batch], micro_batch: Batch) -> list[float]:
    """One loss per example, or per region of each; no gradient is recorded."""
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
    per_example: bool = False,
    together: bool = True,
    clip_threshold: float | None = None,
    normalize: bool = False,
    first_example: int = 0,
    examples: int | None = None,
    sum_over_ranks: SumOverRanks = alone,
) -> Estimate:
    """Two forward passes per direction, or two in all with a direction for every example, four with two for every example.

    The mean of d_i z_i over B examples with directions of their own has up to 1/B of the variance that one shared direction leaves,
    for the same two forwards. It needs numbers that are factors of inputs and outputs (`has_gains`); those can also run +ε and -ε
    in one forward of twice the batch, which reads and dequantizes the weights once. Where directions have regions, the numbers of
    pointwise layers are probed once more by each region of each example, against that region's loss (`core.grouped`). The scales
    are bit for bit what they were, also when `objective` raises.

    Args:
        objective: one loss per example of a micro-batch.
        micro_batches: this process's part of the batch, in parts that fit into memory.
        parametrization: the trained numbers.
        directions: where to probe: shared by all examples, or `directions[i]` for example i of the whole batch over all processes;
            where examples have several, all of them have their first, and then all their next.
        eps: ε, the radius of the probe, in the parametrization's units.
        together: run +ε and -ε in one forward where the numbers and the batch allow it.
        clip_threshold: C of DDC, None for no clipping.
        normalize: divide the derivatives by their spread; a step of one direction would keep nothing but its sign.
        first_example: where this process's micro-batches begin in the whole batch.
        examples: of the whole batch, for `per_example`; None is as many as directions.
        sum_over_ranks: exchanges a count and two sums per direction, once a step.

    Raises:
        ValueError: `per_example` with numbers that have no gains, or an objective that gives one loss for a whole batch; regions
            without `per_example`.
    """
    if per_example and not parametrization.has_gains:
        raise ValueError("these numbers have no factors, which alone can give every example its own direction; use rows or layers")
    probe = _together if together and parametrization.has_gains else _apart
    regions = directions[0].regions
    plus, minus = [0.0] * (len(directions) * regions), [0.0] * (len(directions) * regions)
    if per_example:
        for start, micro_batch in _places(micro_batches, len(directions), first_example, examples or len(directions)):
            stop = start + len(micro_batch)  # type: ignore[arg-type]
            losses = probe(objective, micro_batch, parametrization, directions[start:stop], eps)
            if len(losses[0]) != (stop - start) * regions:
                raise ValueError(
                    f"{len(losses[0])} losses for {stop - start} examples of {regions} regions: per_example needs one loss for each"
                )
            place = slice(start * regions, stop * regions)
            plus[place], minus[place] = losses
        both = sum_over_ranks([*plus, *minus])  # others have zeros where this process has its examples
        return _from_losses(directions, both[: len(plus)], both[len(plus) :], eps, clip_threshold, normalize)
    if regions > 1:
        raise ValueError("regions have directions of their own only where examples have")
    count = 0
    for index, direction in enumerate(directions):
        pairs = [probe(objective, micro_batch, parametrization, [direction], eps) for micro_batch in micro_batches]
        count = sum(len(up) for up, _ in pairs)
        plus[index] = math.fsum(loss for up, _ in pairs for loss in up)
        minus[index] = math.fsum(loss for _, down in pairs for loss in down)
    total, *sums = sum_over_ranks([float(count), *plus, *minus])
    means = [value / total for value in sums]
    return _from_losses(directions, means[: len(plus)], means[len(plus) :], eps, clip_threshold, normalize)


def _places(micro_batches: Sequence[Batch], directions: int, first_example: int, examples: int) -> Iterator[tuple[int, Batch]]:
    """Each micro-batch with the place of its first direction, once for each direction that an example has."""
    for start in range(first_example, directions, examples):
        for micro_batch in micro_batches:
            yield start, micro_batch
            start += len(micro_batch)  # type: ignore[arg-type]


Losses = tuple[list[float], list[float]]
"""One loss per example (or region) at +ε and one at -ε."""


def _together(
    objective: Objective[Batch], batch: Batch, numbers: Parametrization, directions: Sequence[Direction], eps: float
) -> Losses:
    twice = repeated(batch)
    if twice is None:
        return _apart(objective, batch, numbers, directions, eps)
    with numbers.scales.showing(*numbers.probes(directions, [eps, -eps])):
        losses = sample_losses(objective, twice)
    if len(losses) != len(twice) * directions[0].regions:  # one loss for the whole batch: two forwards must tell the signs apart
        return _apart(objective, batch, numbers, directions, eps)
    return losses[: len(losses) // 2], losses[len(losses) // 2 :]


def _apart(
    objective: Objective[Batch], batch: Batch, numbers: Parametrization, directions: Sequence[Direction], eps: float
) -> Losses:
    found = []
    for radius in (eps, -eps):
        with numbers.scales.showing(*numbers.probes(directions, [radius])):
            found.append(sample_losses(objective, batch))
    return found[0], found[1]


def repeated(batch: Any) -> Any:
    """All examples of a batch and then all again; None for a batch that is no tensor and has no method `repeated`."""
    if isinstance(batch, Tensor):
        return torch.cat([batch, batch])
    return batch.repeated() if hasattr(batch, "repeated") else None


def over_regions(values: Sequence[float], regions: int) -> list[float]:
    """The mean over the regions of each direction."""
    return [math.fsum(values[i : i + regions]) / regions for i in range(0, len(values), regions)]


def spread(derivatives: Sequence[float], regions: int = 1) -> float:
    """√(mean d²) over directions; d of a direction is the mean over its regions."""
    of_direction = over_regions(derivatives, regions)
    return math.sqrt(math.fsum(d * d for d in of_direction) / len(of_direction))


def _from_losses(
    directions: Sequence[Direction],
    plus: list[float],
    minus: list[float],
    eps: float,
    clip_threshold: float | None,
    normalize: bool,
) -> Estimate:
    derivatives = [(p - m) / (2 * eps) for p, m in zip(plus, minus, strict=True)]
    projected = [clip_directional_derivative(d, clip_threshold) for d in derivatives]
    clipped = tuple(math.isfinite(d) and d != g for d, g in zip(derivatives, projected, strict=True))
    if normalize:
        unit = spread(projected, directions[0].regions) or 1.0  # all zero: they stay so
        projected = [g / unit for g in projected]
    return Estimate(tuple(directions), tuple(plus), tuple(minus), tuple(derivatives), tuple(projected), clipped)
