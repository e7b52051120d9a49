"""Treat the directions of one example apart from those of the others: leave out directions whose
loss is no number, and divide derivatives by their spread within the example.

Losses and derivatives are lists over directions: the first direction of all examples, then the
second of any. So the directions of an example lie `examples` apart.
"""

import math
from collections.abc import Sequence

ROUNDING = 1e-12
"""Times the largest loss: a smaller spread of an example's losses is rounding and no difference."""


def without_bad(
    at_radii: Sequence[Sequence[float]], examples: int
) -> tuple[list[list[float]], list[bool]]:
    """Replace the losses of directions that have one which is not finite.

    They become the mean loss of the example's other directions, or of the whole step where the
    example has no other. So means keep to what was measured. Where no direction of the step is
    good, all losses stay as they are, and the loop skips the step.

    Args:
        at_radii: losses [radius][direction].

    Returns the losses, and for each direction whether it was left out.
    """
    count = len(at_radii[0])
    bad = [not all(math.isfinite(losses[at]) for losses in at_radii) for at in range(count)]
    if not any(bad) or all(bad):
        return [list(losses) for losses in at_radii], [False] * count
    of_step = _mean(at_radii, [at for at in range(count) if not bad[at]])
    filled = [list(losses) for losses in at_radii]
    for at in range(count):
        if bad[at]:
            good = [one for one in range(at % examples, count, examples) if not bad[one]]
            for losses in filled:
                losses[at] = _mean(at_radii, good) if good else of_step
    return filled, bad


def _mean(at_radii: Sequence[Sequence[float]], chosen: Sequence[int]) -> float:
    return math.fsum(losses[at] for losses in at_radii for at in chosen) / (
        len(chosen) * len(at_radii)
    )


def normalised(
    derivatives: Sequence[float], smallest: float, examples: int, leading: int
) -> list[float]:
    """Divide the derivatives of each example by their rms over its directions.

    This is done for the first `leading` examples. Those behind them, whose losses have another
    unit, are divided by the mean rms of the leading ones, so that the two keep their relation.

    Args:
        smallest: derivatives of an example whose rms is at most this become zero.
    """
    spread = [_rms(derivatives[place::examples]) for place in range(examples)]
    known = [one for one in spread[:leading] if one > smallest]
    usual = math.fsum(known) / len(known) if known else 0.0
    units = [*spread[:leading], *[usual] * (examples - leading)]
    found = []
    for at, derivative in enumerate(derivatives):
        unit = units[at % examples]
        found.append(derivative / unit if unit > smallest or math.isnan(unit) else 0.0)
    return found


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(math.fsum(value * value for value in values) / len(values))
