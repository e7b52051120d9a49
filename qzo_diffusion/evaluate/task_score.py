"""Score a language model on its task, step by step, with intervals."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qzo_diffusion.evaluate import charts

SHARES = {"accuracy": "Accuracy", "f1": "F1"}  # metrics between 0 and 1 where more is better


def half_width(value: float, count: int) -> float:
    """Return half the width of the 95 % interval of a share of `count` examples.

    It is the normal approximation; for F1 it is an upper bound.
    """
    return 1.96 * math.sqrt(max(0.0, value * (1 - value)) / count)


def interval(metric: str, value: float, count: int) -> dict[str, float]:
    """Return `ci95`, half of the interval's width, for a share.

    A mean loss has none: its variance does not follow from the mean.
    """
    return {"ci95": half_width(value, count)} if metric in SHARES else {}


@dataclass(frozen=True)
class TaskScore:
    """Accuracy, F1 or loss of `examples` test examples, by step."""

    task: str
    metric: str
    examples: int
    by_step: Mapping[int, float]

    @classmethod
    def read(cls, evaluation: Mapping[str, Any]) -> "TaskScore":
        """Read evaluation.json of a language model's run.

        Raises:
            KeyError, TypeError, ValueError: it is another file.
        """
        by_step = {
            int(step): math.nan if value is None else float(value)
            for step, value in dict(evaluation["by_step"]).items()
        }
        examples = int(evaluation["test_examples"])
        if examples < 1:
            raise ValueError(f"{examples} test examples")
        return cls(
            evaluation["task"], evaluation["metric"], examples, dict(sorted(by_step.items()))
        )

    @property
    def name(self) -> str:
        return f"{SHARES.get(self.metric, 'Loss')} on {self.task}"

    @property
    def remark(self) -> str:
        return (
            f"{self.examples} test examples, {'higher' if self.metric in SHARES else 'lower'} is "
            "better"
        )

    @property
    def diverged(self) -> int | None:
        """The first step whose metric is not finite."""
        return next((step for step, one in self.by_step.items() if not math.isfinite(one)), None)

    def chart(self) -> dict[str, Any] | None:
        points = [self._point(step, value) for step, value in self.by_step.items()]
        unit = "share" if self.metric in SHARES else "mean"
        return charts.chart(
            self.name,
            [charts.Series("test examples", points, marks=True)],
            f"{unit} of {self.examples}",
        )

    def ends(self) -> tuple[float, float] | None:
        """The metric at the first and at the last step; None until there are two."""
        if len(self.by_step) < 2:
            return None
        base, *_, tuned = self.by_step.values()
        return base, tuned

    def difference(self, base: float, tuned: float) -> dict[str, Any]:
        """Return delta and delta_ci95, named as by `intervals.paired`.

        Both values belong to the same examples, of which only sums are kept. The interval treats
        them as independent, and so is too wide.
        """
        delta, interval = tuned - base, None
        if self.metric in SHARES:
            half = math.hypot(half_width(base, self.examples), half_width(tuned, self.examples))
            interval = (delta - half, delta + half)
        return {"delta": delta, "delta_ci95": interval}

    def _point(self, step: int, value: float) -> charts.Point:
        if self.metric not in SHARES:
            return charts.Point(step, value)
        half = half_width(value, self.examples)
        return charts.Point(step, value, value - half, value + half)
