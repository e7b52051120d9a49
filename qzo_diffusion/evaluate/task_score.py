"""How well a language model does its task, step by step: a curve, a row of figures and a sentence for the page."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qzo_diffusion.evaluate import charts

SHARES = {"accuracy": "Accuracy", "f1": "F1"}  # metrics between 0 and 1, of which more is better


def half_width(value: float, count: int) -> float:
    """Of the 95 % confidence interval of a share of `count` examples (normal approximation; for F1 an upper bound of it)."""
    return 1.96 * math.sqrt(max(0.0, value * (1 - value)) / count)


@dataclass(frozen=True)
class TaskScore:
    """Accuracy or F1 of `examples` test examples, or their loss, by step."""

    task: str
    metric: str
    examples: int
    by_step: Mapping[int, float]

    @classmethod
    def read(cls, evaluation: Mapping[str, Any]) -> "TaskScore":
        """From evaluation.json of a language model's run. Raises KeyError, TypeError or ValueError for another file."""
        by_step = {int(step): float(value) for step, value in evaluation["by_step"].items()}
        return cls(evaluation["task"], evaluation["metric"], evaluation["test_examples"], dict(sorted(by_step.items())))

    @property
    def name(self) -> str:
        return SHARES.get(self.metric, "Loss")

    def chart(self) -> dict[str, Any] | None:
        points = [self._point(step, value) for step, value in self.by_step.items()]
        unit = "share" if self.metric in SHARES else "mean"
        return charts.chart(
            f"{self.name} on {self.task}", [charts.Series("test examples", points, marks=True)], f"{unit} of {self.examples}"
        )

    def row(self) -> dict[str, Any] | None:
        """The first and the last step; None until there are two."""
        if len(self.by_step) < 2:
            return None
        base, *_, tuned = self.by_step.values()
        interval = self._of_difference(base, tuned)
        return {
            "name": f"{self.name} on {self.task}",
            "base": base,
            "tuned": tuned,
            "delta": tuned - base,
            "ci95": interval,
            "sure": interval is not None and not interval[0] <= 0 <= interval[1],
            "remark": f"{self.examples} test examples, {'higher' if self.metric in SHARES else 'lower'} is better",
        }

    def verdict(self) -> list[dict[str, str]]:
        row = self.row()
        if row is None or row["ci95"] is None:
            return []
        low, high = row["ci95"]
        sign = "open" if not row["sure"] else "good" if row["delta"] > 0 else "bad"
        words = {"good": "rose", "bad": "fell", "open": "did not change for certain"}[sign]
        change = f"{row['base']:.3f} to {row['tuned']:.3f}, {row['delta']:+.3f} (95 % interval {low:+.3f} to {high:+.3f})"
        return [{"sign": sign, "text": f"{self.name} on {self.task} {words}: {change}."}]

    def _point(self, step: int, value: float) -> charts.Point:
        if self.metric not in SHARES:
            return charts.Point(step, value)
        half = half_width(value, self.examples)
        return charts.Point(step, value, value - half, value + half)

    def _of_difference(self, base: float, tuned: float) -> tuple[float, float] | None:
        """Both are of the same examples, of which only the sums are kept: as if independent, which makes it too wide."""
        if self.metric not in SHARES:
            return None
        half = math.hypot(half_width(base, self.examples), half_width(tuned, self.examples))
        return tuned - base - half, tuned - base + half
