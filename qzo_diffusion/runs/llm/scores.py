"""Score a language model on held-out examples of its task before and after tuning."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qzo_diffusion.core.errors import OutputError
from qzo_diffusion.evaluate.task_score import interval
from qzo_diffusion.llm.causal_lm import CausalLm
from qzo_diffusion.llm.objectives import mean_metric
from qzo_diffusion.llm.task_file import TaskSpec
from qzo_diffusion.llm.tasks import Batch
from qzo_diffusion.system.reading import read_json
from qzo_diffusion.train.run_folder import RunFolder
from qzo_diffusion.train.tracking import Tracker

FILE = "evaluation.json"


@dataclass
class Scores:
    """`runs.plan.Callbacks` of a language-model run.

    evaluation.json keeps the scores, also for a resumed run.
    """

    out: RunFolder
    lm: CausalLm
    spec: TaskSpec
    test: Sequence[Batch]
    tracker: Tracker
    held_out: Sequence[Batch]
    every: int = 0

    def show(self, step: int) -> None:
        found = self.measured()
        if not self.test or str(step) in found:
            return
        value = mean_metric(self.lm, self.test, self.spec)
        self.tracker.report(
            f"step {step}: {self.spec.metric} {value:.4f} on {self._count} test examples"
        )
        self.out.write_json(FILE, self._facts() | {"by_step": found | {str(step): value}})

    def measured(self) -> dict[str, float]:
        """Return step -> metric."""
        path = self.out.path / FILE
        try:
            found = read_json(path)["by_step"] if path.exists() else {}
            return {
                str(int(step)): math.nan if value is None else float(value)
                for step, value in found.items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise OutputError(
                f"{path} is damaged: {error}", "the scores of the run by step", "remove it"
            ) from None

    def results(self) -> dict[str, Any]:
        found = self.measured()
        steps = sorted(map(int, found))
        if not steps:
            return {"task": self.spec.name, self.spec.metric: None}
        start, end = found[str(steps[0])], found[str(steps[-1])]
        return (
            self._facts()
            | {self.spec.metric: {"start": start, "end": end}}
            | interval(self.spec.metric, end, self._count)
        )

    @property
    def _count(self) -> int:
        return sum(map(len, self.test))

    def _facts(self) -> dict[str, Any]:
        return {"task": self.spec.name, "metric": self.spec.metric, "test_examples": self._count}


def _number(value: Any) -> float:
    """Read a metric; null stands for one that is not finite."""
    return math.nan if value is None else float(value)
