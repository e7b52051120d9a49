"""How far the first steps may go: less than the usual rate where the loss curves much for its slope.

A normalised step of B examples moves the numbers by η/B · Σ z_i d_i / √s, s the mean of d². Along the gradient that gains η c √s,
where c is the share of an example's squared gradient that the batch has in common, and what is random in it costs η² tr(H) / 2B. So
the best rate goes as √s / tr(H), and normalising takes the very √s out by which one style may be steeper than another. Both are
measured before the first step; c is not, which would take many more forwards.

With z of ±1, L(θ ± ε z) is above L(θ) by ε² tr(H) / 2 in the mean. On `tiny` tr(H) is 9 to 14 for every style, √s 0.3 to 1.2, and
the rates that were found best one by one are 0.6 √s / tr(H) for 500 steps, but never above the usual one (docs/decisions.md).
"""

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from qzo_diffusion.core.noise import directions_of_step
from qzo_diffusion.core.parametrization import Parametrization
from qzo_diffusion.core.spsa import Batch, Objective, SumOverRanks, alone, estimate, sample_losses, spread
from qzo_diffusion.train.loop import Probing, StepBatch

BATCHES = 4  # of the first steps: √s is then known to a fifth, tr(H) to a tenth
WIDER = 3.0  # than a step's probes: what is measured goes with ε², and losses in 16 bits have noise of their own
FULL_RATE = 0.08  # √s / tr(H) from which the usual rate is right


@dataclass(frozen=True)
class Terrain:
    """slope: √(mean d²) over the directions of a batch. curvature: tr(H) over the trained numbers, with its standard error."""

    slope: float
    curvature: float
    error: float

    @property
    def rate_factor(self) -> float:
        """What the usual rate is to be multiplied by, at most 1; 1 where no curvature can be told from noise."""
        if not (math.isfinite(self.slope) and self.curvature > 2 * self.error) or self.slope == 0:
            return 1.0
        return min(1.0, self.slope / self.curvature / FULL_RATE)


def survey(
    objective: Objective[Batch],
    batch_of_step: Callable[[int], StepBatch[Batch]],
    parametrization: Parametrization,
    probing: Probing,
    sum_over_ranks: SumOverRanks = alone,
    progress: Callable[[Iterable[int]], Iterable[int]] = lambda steps: steps,
) -> Terrain:
    """Slope and curvature where the numbers are, over the batches of the first steps: three forwards of each example.

    Every rank calls this, and all find the same. `progress` passes the steps on and shows how far it is.
    """
    slopes, curvatures = [], []
    eps = WIDER * probing.eps
    for step in progress(range(BATCHES)):
        batch = batch_of_step(step)
        mine = sum(map(len, batch.micro_batches))  # type: ignore[arg-type]
        examples = batch.examples or mine
        found = estimate(
            objective,
            batch.micro_batches,
            parametrization,
            directions_of_step(probing.seed, step, examples, probing.distribution, batch.regions),
            eps=eps,
            per_example=True,
            together=probing.together,
            first_example=batch.first_example,
            examples=examples,
            sum_over_ranks=sum_over_ranks,
        )
        with parametrization.scales.showing(parametrization.view()):
            losses = [loss for micro_batch in batch.micro_batches for loss in sample_losses(objective, micro_batch)]
        total, count = sum_over_ranks([math.fsum(losses), float(len(losses))])
        curvatures.append(2 * (found.loss - total / count) / eps**2)
        slopes.append(spread(found.directional_derivative, batch.regions))
    if not all(map(math.isfinite, [*slopes, *curvatures])):  # the loop will see it, and skip or stop
        return Terrain(math.nan, math.nan, math.nan)
    error = statistics.stdev(curvatures) / math.sqrt(BATCHES)
    return Terrain(math.sqrt(statistics.fmean(slope**2 for slope in slopes)), statistics.fmean(curvatures), error)
