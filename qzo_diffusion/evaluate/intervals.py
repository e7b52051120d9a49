"""Compute bootstrap intervals of 95 %, from resamples with a given seed.

Twenty pictures a side leave wide intervals. They are computed everywhere and hidden nowhere. A
single value has none.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
Interval = tuple[float, float]
RESAMPLES, SEED = 2000, 0
# Figures of a diverged run are not finite. Neither are their intervals; numpy must not warn.
_QUIET = np.errstate(invalid="ignore", over="ignore")


def counts(size: int, resamples: int = RESAMPLES, seed: int = SEED) -> Values:
    """Return how often each of `size` items is drawn in each resample, [resamples, size].

    Every row sums to `size`.
    """
    generator = np.random.Generator(np.random.Philox(seed))
    return generator.multinomial(size, np.full(size, 1 / size), resamples).astype(np.float64)


def interval(statistics: Values) -> Interval:
    """Return the middle 95 % of a statistic over resamples (Efron's percentile interval)."""
    low, high = np.percentile(statistics, [2.5, 97.5])
    return float(low), float(high)


@_QUIET
def of_mean(values: Sequence[float], clusters: Sequence[str] | None = None) -> Interval | None:
    """Return the interval of the mean, None for fewer than two values.

    Args:
        clusters: the cluster that each value belongs to. Values of one cluster (noise levels of
            one picture) are drawn together.
    """
    if clusters is None:
        sums: Values = np.asarray(values, np.float64)
        sizes: Values = np.ones(len(sums))
    else:
        names, which = np.unique(np.asarray(clusters), return_inverse=True)
        sums = np.asarray(
            np.bincount(which, np.asarray(values, np.float64), len(names)), np.float64
        )
        sizes = np.asarray(np.bincount(which, minlength=len(names)), np.float64)
    if len(sums) < 2:
        return None
    drawn = counts(len(sums))
    return interval(drawn @ sums / (drawn @ sizes))


@_QUIET
def of_difference(first: Sequence[float], second: Sequence[float]) -> Interval | None:
    """Return the interval of mean(first) - mean(second) for two independent sets.

    Return None if a set has fewer than two values.
    """
    if min(len(first), len(second)) < 2:
        return None
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    return interval(counts(len(a)) @ a / len(a) - counts(len(b), seed=SEED + 1) @ b / len(b))


@_QUIET
def of_statistic(size: int, statistic: Callable[[Values], Values]) -> Interval | None:
    """Return the interval of a statistic that is computed from `counts`, None for fewer than two
    items.
    """
    return None if size < 2 else interval(statistic(counts(size)))


@_QUIET
def summary(values: Sequence[float]) -> dict[str, object]:
    """Return n, mean, std (of the sample, None for one value) and the interval of the mean."""
    mean = float(np.mean(values))
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"n": len(values), "mean": mean, "std": std, "ci95": of_mean(values)}


@_QUIET
def paired(
    tuned: Sequence[float], base: Sequence[float], clusters: Sequence[str] | None = None
) -> dict[str, object]:
    """Return the mean of tuned - base, item by item (equal prompts and seeds), and its interval."""
    differences = (np.asarray(tuned, np.float64) - np.asarray(base, np.float64)).tolist()
    return {
        "base_mean": float(np.mean(base)),
        "delta": float(np.mean(differences)),
        "delta_ci95": of_mean(differences, clusters),
    }


def gained(
    tuned: Sequence[float],
    base: Sequence[float],
    begun: Sequence[float] | None = None,
    clusters: Sequence[str] | None = None,
) -> dict[str, object]:
    """Return the change from the base, as `paired`.

    A run that began with another run's scales is compared with those instead; `begun_mean` is
    added.
    """
    if begun is None:
        return paired(tuned, base, clusters)
    found = paired(tuned, begun, clusters)
    return found | {"base_mean": float(np.mean(base)), "begun_mean": found["base_mean"]}
