"""Measure slope and curvature before the first step, and lower the learning rate where the loss
curves much for its slope.

A normalised step of B examples moves θ by η/B · Σ z_i d_i / √s, where s is the mean of d². Along
the gradient this gains η c √s, where c is the share of an example's squared gradient that the batch
has in common; the random rest costs η² tr(H) / 2B. So the best rate is proportional to √s / tr(H),
but normalising divides by √s. Both are measured here. c is not: that would take many more forward
passes.

With z of ±1, L(θ ± ε z) exceeds L(θ) by ε² tr(H) / 2 on average. On `tiny` tr(H) is 9 to 14 for
every style and √s 0.3 to 1.2; where √s / tr(H) is small the usual rate was too high
(docs/decisions/rates.md D24)."""

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from qzo_diffusion.core.parametrization import Parametrization
from qzo_diffusion.core.probes import Batch, Objective, sample_losses
from qzo_diffusion.core.probing import Probing, StepBatch
from qzo_diffusion.core.spsa import SumOverRanks, no_reduce, over_patch_groups, probe, rms

# at least: √s / tr(H) is then known to a quarter, for the forward passes of 1.5 steps
EXAMPLES = 16
# times the radius of a step: curvature shows as ε², above the noise of losses in 16 bits
WIDER = 3.0
FULL_RATE = 0.055  # √s / tr(H) from which the usual rate is right
MOST_ROOM = 4.0  # a bound is widened or narrowed by as much


@dataclass(frozen=True)
class LrCalibration:
    """Slope and curvature of the loss at θ.

    Attributes:
        slope: √(mean d²) over the directions of a batch.
        curvature: tr(H) with respect to θ.
        error: the standard error of the curvature.
    """

    slope: float
    curvature: float
    error: float

    @property
    def _known(self) -> bool:
        return math.isfinite(self.slope) and self.curvature > 2 * self.error and self.slope != 0

    @property
    def rate_factor(self) -> float:
        """The factor for the usual rate, at most 1; 1 where the curvature is within its noise."""
        if not self._known:
            return 1.0
        return min(1.0, self.slope / self.curvature / FULL_RATE)

    @property
    def room(self) -> float:
        """The factor for the usual bound: how far the loss falls before it bends.

        1 where the curvature is within its noise.
        """
        if not self._known:
            return 1.0
        return min(MOST_ROOM, max(1 / MOST_ROOM, self.slope / self.curvature / FULL_RATE))


def calibration_batches(examples: int) -> int:
    """Return the number of batches of so many examples that a calibration evaluates."""
    return -(-EXAMPLES // examples)


def calibrate(
    objective: Objective[Batch],
    batch_of_step: Callable[[int], StepBatch[Batch]],
    parametrization: Parametrization,
    probing: Probing,
    sum_over_ranks: SumOverRanks = no_reduce,
    progress: Callable[[Iterable[int]], Iterable[int]] = lambda steps: steps,
) -> LrCalibration:
    """Measure slope and curvature at θ on the batches of the first steps: three forward passes of
    `EXAMPLES` examples or more.

    Every rank calls this, and all get the same result. `progress` wraps the iteration over steps.
    """
    slopes, curvatures = [], list[float]()
    first = batch_of_step(0)
    for step in progress(range(calibration_batches(first.whole))):
        batch = batch_of_step(step) if step else first
        slope, of_examples = _of_batch(
            objective, batch, parametrization, probing, step, sum_over_ranks
        )
        slopes.append(slope)
        curvatures += of_examples
    if len(curvatures) < 2 or not all(map(math.isfinite, [*slopes, *curvatures])):
        # the loop will see it, and skip or stop
        return LrCalibration(math.nan, math.nan, math.nan)
    error = statistics.stdev(curvatures) / math.sqrt(len(curvatures))
    return LrCalibration(
        math.sqrt(statistics.fmean(slope**2 for slope in slopes)),
        statistics.fmean(curvatures),
        error,
    )


def _of_batch(
    objective: Objective[Batch],
    batch: StepBatch[Batch],
    parametrization: Parametrization,
    probing: Probing,
    step: int,
    sum_over_ranks: SumOverRanks,
) -> tuple[float, list[float]]:
    """√(mean d²) of one batch, and zᵀHz of each example."""
    patch_groups, eps = batch.patch_groups, WIDER * probing.eps
    on_both_sides = replace(probing, eps=eps, num_directions=1, estimator="antithetic")
    found = probe(objective, batch, parametrization, on_both_sides, step, sum_over_ranks)
    with parametrization.scales.override(parametrization.perturbed()):
        mine = [
            loss
            for micro_batch in batch.micro_batches
            for loss in sample_losses(objective, micro_batch)
        ]
    middle = [0.0] * (batch.whole * patch_groups)
    middle[batch.first_example * patch_groups : batch.first_example * patch_groups + len(mine)] = (
        mine
    )
    middle = sum_over_ranks(middle)  # others have zeros where this process has its examples
    bends = [
        (up + down - 2 * at) / eps**2
        for up, down, at in zip(found.loss_plus, found.loss_minus, middle, strict=True)
    ]
    return rms(found.directional_derivative, patch_groups), over_patch_groups(bends, patch_groups)
