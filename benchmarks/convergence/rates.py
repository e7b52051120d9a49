"""Which rates of a grid are still to run. All rates are powers of √10."""

import math
from collections.abc import Mapping, Sequence

MOST_EXTENSIONS = 6  # beyond the stated grid; then the best stays at the edge


def rate(exponent: int) -> float:
    """√10 to the power of `exponent`, to three digits, so that files and tables can name it."""
    return float(f"{math.sqrt(10) ** exponent:.3g}")


def best_exponent(final: Mapping[int, float]) -> int | None:
    """The rate with the lowest final loss; a run that diverged has an infinite one.

    None without any finite one.
    """
    finite = {exponent: loss for exponent, loss in final.items() if math.isfinite(loss)}
    return min(finite, key=lambda exponent: (finite[exponent], exponent)) if finite else None


def next_exponents(grid: Sequence[int], final: Mapping[int, float]) -> list[int]:
    """Those of the grid that have no result, then one beyond the edge that is best, until the best
    has both neighbours.
    """
    missing = [exponent for exponent in grid if exponent not in final]
    if missing or len(final) >= len(grid) + MOST_EXTENSIONS:
        return missing
    best = best_exponent(final)
    if best is None:  # all diverged
        best = min(final)
    return [exponent for exponent in (best - 1, best + 1) if exponent not in final][:1]
