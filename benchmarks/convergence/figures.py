"""The figures of finished cells: how many times fewer forward passes reach the reference's final
loss, and the share of the exact gradient's gain that a method has.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.convergence.methods import (
    BUDGET,
    EXACT,
    FAMILIES,
    OURS,
    Families,
    by_exponent,
    reference,
    settled,
)
from benchmarks.convergence.rates import best_exponent
from benchmarks.convergence.results import Result, Results, final_losses, loss_of

TRAINED = 0.05  # of the exact gradient's gain; a reference below it did not train

Point = Sequence[Any]


def crossing(curve: Sequence[Point], target: float) -> float | None:
    """Forward passes after which the loss first is `target` or less, linear between evaluations;
    None when it never is.
    """
    before: tuple[float, float] | None = None
    for spent, loss in curve:
        if loss is not None and loss <= target:
            if before is None:
                return float(spent)
            at, above = before
            return at + (spent - at) * (above - target) / (above - loss)
        before = None if loss is None else (spent, loss)
    return None


def spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "mean": math.fsum(values) / len(values),
        "low": min(values),
        "high": max(values),
        "seeds": len(values),
    }


def budget_ratio(
    curves: Mapping[int, Sequence[Point]], targets: Mapping[int, float], budget: int
) -> dict[str, float] | None:
    """How many times fewer forward passes than `budget` reach the target of the same seed.

    The mean is that of the passes over the seeds, not of the ratios, which a single lucky seed
    would lift. None when a seed never gets there, or when there was nothing to reach.

    Args:
        curves, targets: by seed; seeds that are in one of both alone do not count.
    """
    found = [crossing(curves[seed], targets[seed]) for seed in sorted(curves.keys() & targets)]
    reached = [at for at in found if at is not None and at > 0]
    if len(reached) < len(found) or not reached:
        return None
    ratios = [budget / at for at in reached]
    return spread(ratios) | {"mean": budget / spread(reached)["mean"]}


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(math.fsum(map(math.log, values)) / len(values))


class Style:
    """The runs of one style, by family, each at the rate that is compared."""

    def __init__(self, name: str, results: Results, families: Families = FAMILIES) -> None:
        self.name, self._families = name, families
        self._final = final_losses(results, families)
        self.runs = {one: self._runs(one, results) for one in families}
        self.reference = reference(name, self._final, families)
        exact = self.losses(EXACT)
        self.best = min(exact) if exact else None

    def exponent(self, family: str) -> tuple[bool, int | None]:
        """Whether a rate is known, and its exponent: the settled one, else the best so far."""
        one = self._families[family]
        known, exponent = settled(one, self.name, self._final)
        if known:
            return True, exponent
        best = best_exponent(by_exponent(one, self.name, self._final))
        return best is not None, best

    def _runs(self, family: str, results: Results) -> list[Result]:
        """The finished seeds at that rate; none where one of them diverged."""
        known, exponent = self.exponent(family)
        one = self._families[family]
        names = [one.cell(self.name, exponent, seed).name for seed in range(one.seeds)]
        finished = [name for name in names if known and name in self._final]
        whole = all(math.isfinite(self._final[name]) for name in finished)
        return [results[name] for name in finished] if whole else []

    def losses(self, family: str) -> list[float]:
        """Held-out losses as with the noise of the first seed: each seed's gain below the start."""
        start = self.start
        return [] if start is None else [start - gain for gain in self._gains(family)]

    def _gains(self, family: str) -> list[float]:
        """Each seed's own start less its own end."""
        one = self._families[family]
        return [run["curve"][0][1] - loss_of(one, run) for run in self.runs[family]]

    @property
    def start(self) -> float | None:
        """The base's loss with the first seed's noise."""
        firsts = [run for runs in self.runs.values() for run in runs if run["seed"] == 0]
        return float(firsts[0]["curve"][0][1]) if firsts else None

    def shares(self, family: str) -> dict[str, float] | None:
        """Of the exact gradient's gain with the first seed's noise."""
        gains = self._gains(family)
        if not gains or self.best is None or self.start is None:
            return None
        return spread([gain / (self.start - self.best) for gain in gains])

    def trained(self) -> bool:
        """Whether the reference gained enough to be compared with."""
        found = self.shares(self.reference) if self.reference else None
        return found is not None and found["mean"] >= TRAINED

    def ratio(self, family: str) -> dict[str, float] | None:
        """How many times fewer passes than the reference's reach its final loss."""
        if self._families[family].exact or self.reference is None or not self.trained():
            return None
        one = self._families[self.reference]
        targets = {run["seed"]: loss_of(one, run) for run in self.runs[self.reference]}
        curves = {run["seed"]: run["curve"] for run in self.runs[family]}
        return budget_ratio(curves, targets, one.passes(one.steps))

    def figures(self) -> dict[str, Any]:
        return {
            "start_loss": self.start,
            "exact_loss": self.best,
            "reference": self.reference,
            "reference_trained": self.trained(),
            "families": {name: self._of_family(name) for name, runs in self.runs.items() if runs},
        }

    def _of_family(self, name: str) -> dict[str, Any]:
        runs = self.runs[name]
        return {
            "lr": runs[0]["lr"],
            "final_loss": spread(self.losses(name)),
            "share_of_exact_gain": self.shares(name),
            "times_fewer_passes": self.ratio(name),
            "pictures": next((run["pictures"] for run in runs if run["pictures"]), None),
        }


def figures(
    results: Results, names: Sequence[str], families: Families = FAMILIES
) -> dict[str, Any]:
    """Everything that the JSON holds of these styles beside where it was measured."""
    styles = [Style(name, results, families) for name in names]
    ours, by_rows = OURS

    def means(of: str, family: str) -> dict[str, float]:
        found = {style.name: getattr(style, of)(family) for style in styles}
        return {name: one["mean"] for name, one in found.items() if one is not None}

    def losses(family: str | None, style: Style) -> float | None:
        known = style.losses(family) if family else []
        return spread(known)["mean"] if known else None

    return {
        "budget": BUDGET,
        "method_of_default": ours,
        "speedup": means("ratio", ours),
        "speedup_by_rows": means("ratio", by_rows),
        "gain_share": means("shares", ours),
        "reference_gain_share": _known(
            {s.name: (s.shares(s.reference) or {}).get("mean") for s in styles if s.reference}
        ),
        "start": _known({style.name: style.start for style in styles}),
        "paper": _known({style.name: losses(style.reference, style) for style in styles}),
        "default": _known({style.name: losses(ours, style) for style in styles}),
        "first_order": _known({style.name: style.best for style in styles}),
        "styles": {style.name: style.figures() for style in styles},
        "curves": {name: result["curve"] for name, result in sorted(results.items())},
    }


def _known(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}
