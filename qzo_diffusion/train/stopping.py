"""When a run ends before its last step by itself: held-out losses that fall no more, or time."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

Reason = Literal["patience", "time", "person"]


@dataclass(frozen=True)
class Limits:
    """The ends that were asked for; None is no limit.

    Attributes:
        patience: the most validations in a row without a lower loss.
        deadline: in seconds of `time.monotonic`.
        enough: whether a person said that the run is to end with what it has.
    """

    patience: int | None = None
    deadline: float | None = None
    enough: Callable[[], bool] = lambda: False

    def reached(self, losses: Mapping[int, float]) -> Reason | None:
        """The limit that was reached; `losses` are the held-out losses by step."""
        if self.patience is not None and validations_since_best(losses) >= self.patience:
            return "patience"
        if self.deadline is not None and time.monotonic() >= self.deadline:
            return "time"
        if self.enough():
            return "person"
        return None


def best_step(losses: Mapping[int, float]) -> int | None:
    """The step with the lowest held-out loss, the first of equal ones; None without a number."""
    numbers = [(loss, step) for step, loss in losses.items() if not math.isnan(loss)]
    return min(numbers)[1] if numbers else None


def validations_since_best(losses: Mapping[int, float]) -> int:
    """Return the number of validations after the best one; all of them if no loss is finite."""
    best = best_step(losses)
    return sum(best is None or step > best for step in losses)
