"""Figures of finished cells: crossings, shares of the first-order gain, ratios, and missing cells.

Missing cells are named and left out of every mean; nothing replaces them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.convergence.methods import (
    FAMILIES,
    FIRST_ORDER,
    REFERENCES,
    best_exponent,
    final_by_exponent,
    next_exponents,
    rate_of,
)
from benchmarks.convergence.results import final_losses
from benchmarks.convergence.settings import BUDGET, DATA, DEFAULT, UNSEEN, Cell, Family

TRAINED = 0.05  # of the first-order gain; a reference below it did not train

Results = Mapping[str, Mapping[str, Any]]
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
    curves: Sequence[Sequence[Point]], target: float, budget: int
) -> dict[str, float] | None:
    """How many times fewer forward passes than `budget` reach `target`.

    The mean is that of the passes over the seeds, not of the ratios, which a single lucky seed
    would lift. None when a seed never gets there, or when there was nothing to reach.
    """
    found = [crossing(curve, target) for curve in curves]
    reached = [at for at in found if at is not None and at > 0]
    if len(reached) < len(curves) or not reached:
        return None
    ratios = [budget / at for at in reached]
    return spread(ratios) | {"mean": budget / spread(reached)["mean"]}


def share_of_gain(start: float, final: float, best: float) -> float:
    """Of the way from `start` to the first-order `best`."""
    return (start - final) / (start - best)


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def curve_of(result: Mapping[str, Any]) -> Sequence[Point]:
    curve: Sequence[Point] = result["curve"]
    return curve


class Style:
    """What the finished cells say about one set of data."""

    def __init__(self, data: str, results: Results) -> None:
        self.data, self.results = data, results
        self._final = final_losses(results)
        self.runs = {name: self._runs(family) for name, family in FAMILIES.items()}
        self.start = next((run["start_loss"] for runs in self.runs.values() for run in runs), None)
        self.best = self._lowest(FIRST_ORDER)
        self.reference = self._reference()
        self.target = (
            spread([run["final_loss"] for run in self.runs[self.reference]])["mean"]
            if self.reference
            else None
        )

    def exponent(self, family: Family) -> float | None:
        """The rate compared: the settled one, else the best of those finished, None when there is
        none that held.
        """
        settled = rate_of(family, self.data, self._final)
        return (
            settled
            if settled is not None
            else best_exponent(final_by_exponent(family, self.data, self._final))
        )

    def _runs(self, family: Family) -> list[Mapping[str, Any]]:
        """The seeds at that rate that did not diverge."""
        exponent = self.exponent(family)
        if exponent is None:
            return []
        cells = [
            Cell(self.data, family.at(exponent, self.data), seed) for seed in range(family.seeds)
        ]
        found = [self.results[cell.name] for cell in cells if cell.name in self.results]
        return [result for result in found if result["final_loss"] is not None]

    def _lowest(self, name: str) -> float | None:
        """Of the whole curve: more steps of the first order may overfit, and its best is what there
        was to reach.
        """
        losses = [loss for run in self.runs[name] for _, loss in curve_of(run) if loss is not None]
        return min(losses) if losses else None

    def _reference(self) -> str | None:
        """The better of those whose grid is finished."""
        ready = [
            name
            for name in REFERENCES
            if rate_of(FAMILIES[name], self.data, self._final) is not None and self.runs[name]
        ]
        return min(ready, key=lambda name: self.runs[name][0]["final_loss"], default=None)

    def share(self, name: str) -> dict[str, float] | None:
        """Of the gain that first order on dense scales reaches.

        First-order families count with their lowest loss, too.
        """
        if self.best is None or self.start is None or not self.runs[name]:
            return None
        if FAMILIES[name].template.first_order:
            return spread([share_of_gain(self.start, self._lowest(name) or math.nan, self.best)])
        return spread(
            [share_of_gain(self.start, run["final_loss"], self.best) for run in self.runs[name]]
        )

    def trained(self) -> bool | None:
        """Whether the reference reached enough of the first-order gain to be compared with; None
        while that is not known.
        """
        found = self.share(self.reference) if self.reference else None
        return None if found is None else found["mean"] >= TRAINED

    def ratio(self, name: str) -> dict[str, float] | None:
        family = FAMILIES[name]
        if (
            self.target is None
            or not self.runs[name]
            or family.template.first_order
            or self.trained() is False
        ):
            return None
        return budget_ratio([curve_of(run) for run in self.runs[name]], self.target, BUDGET)

    def loss_of(self, name: str) -> float | None:
        """Held-out, at the end, mean over the seeds."""
        runs = self.runs[name]
        return spread([run["final_loss"] for run in runs])["mean"] if runs else None

    def share_of(self, name: str) -> float | None:
        """The share of the first-order gain, as a plain number."""
        found = self.share(name)
        return None if found is None else found["mean"]

    def reference_share(self) -> float | None:
        """Of the reference over the long budget."""
        return self.share_of(f"{self.reference}_long") if self.reference else None

    def gain_over_tuned(self) -> float | None:
        """What the default gains with the rate that it has by itself, over what it gains at the
        best rate of a grid.
        """
        tuned, own = self.loss_of(f"{DEFAULT}_tuned"), self.loss_of(DEFAULT)
        return (
            None
            if tuned is None or own is None or self.start is None
            else (self.start - own) / (self.start - tuned)
        )

    def missing(self) -> list[str]:
        """Sentences."""
        if self.start is None:
            return ["no cell is finished"]
        found = []
        for name, family in FAMILIES.items():
            if self.data not in family.data:
                continue
            if family.same_rate_as and rate_of(family, self.data, self._final) is None:
                found.append(f"{name}: the rate of {family.same_rate_as} is not known yet")
                continue
            tried = final_by_exponent(family, self.data, self._final)
            left = [] if family.same_rate_as else next_exponents(family.exponents, tried)
            if left:
                found.append(
                    f"{name}: not run at rate "
                    f"{', '.join(f'{family.at(exponent, self.data).lr:.3g}' for exponent in left)}"
                )
            elif self._at_edge(family, tried):
                found.append(f"{name}: the best rate is at the edge of those tried")
            finished_seeds, wanted = len(self.runs[name]), family.seeds
            if not left and finished_seeds < wanted:
                found.append(f"{name}: {finished_seeds} of {wanted} seeds finished")
        return found

    def provisional(self) -> list[str]:
        """What of the missing could still change the default's ratio."""
        decisive = (*REFERENCES, DEFAULT, FIRST_ORDER)
        return [sentence for sentence in self.missing() if sentence.partition(":")[0] in decisive]

    @staticmethod
    def _at_edge(family: Family, tried: Mapping[float, float]) -> bool:
        best = best_exponent(tried)
        return len(family.exponents) > 1 and best in (min(tried), max(tried))

    def figures(self) -> dict[str, Any]:
        families = {}
        for name, family in FAMILIES.items():
            runs = self.runs[name]
            if runs:
                exponent = self.exponent(family)
                families[name] = {
                    "lr": family.at(exponent, self.data).lr if exponent is not None else None,
                    "final_loss": spread([run["final_loss"] for run in runs]),
                    "budget": family.template.budget,
                    "unit": runs[0]["unit"],
                    "share_of_first_order_gain": self.share(name),
                    "budget_to_reach_ratio": self.ratio(name),
                    "processor_seconds": round(
                        math.fsum(run["seconds"]["processor"] for run in runs) / len(runs), 1
                    ),
                }
        return {
            "start_loss": self.start,
            "first_order_loss": self.best,
            "reference": self.reference,
            "reference_trained": self.trained(),
            "target_loss": self.target,
            "families": families,
            "provisional_because": self.provisional(),
            "missing": self.missing(),
        }


def _known(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}


def figures(results: Results) -> dict[str, Any]:
    """Everything that the JSON holds beside where it was measured."""
    styles = {data: Style(data, results) for data in DATA}
    ratios = {data: style.ratio(DEFAULT) for data, style in styles.items()}
    known = {data: ratio["mean"] for data, ratio in ratios.items() if ratio is not None}
    unseen = Style(UNSEEN, results)
    return {
        "budget": BUDGET,
        "method_of_default": DEFAULT,
        "speedup": known,
        "gain_share": _known(
            {data: style.share_of(f"{DEFAULT}_long") for data, style in styles.items()}
        ),
        "reference_gain_share": _known(
            {data: style.reference_share() for data, style in styles.items()}
        ),
        "start": _known({data: style.start for data, style in styles.items()}),
        "paper": _known({data: style.target for data, style in styles.items()}),
        "default": _known({data: style.loss_of(DEFAULT) for data, style in styles.items()}),
        "first_order": _known({data: style.best for data, style in styles.items()}),
        "default_gain_over_tuned": _known(
            {data: style.gain_over_tuned() for data, style in (*styles.items(), (UNSEEN, unseen))}
        ),
        "styles": {data: style.figures() for data, style in styles.items()},
        "default_ratio": {
            "geometric_mean": geometric_mean(list(known.values())) if known else None,
            "styles": sorted(known),
            "missing": [data for data in DATA if data not in known],
            "provisional_because": [
                f"{data}: {reason}"
                for data in sorted(known)
                for reason in styles[data].provisional()
            ],
        },
        "missing": [
            f"{style.data}: {m}" for style in (*styles.values(), unseen) for m in style.missing()
        ],
        "curves": {name: result["curve"] for name, result in sorted(results.items())},
    }
