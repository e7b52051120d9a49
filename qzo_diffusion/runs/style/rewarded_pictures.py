"""Show a run on rewards while it goes on: its pictures of prompts that it is not trained on, with
their rewards and a second score that is not trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from qzo_diffusion.core.errors import UserError
from qzo_diffusion.evaluate.reward_scores import SECOND, TRAINED, change, gamed
from qzo_diffusion.runs.style.rewards import Rewards
from qzo_diffusion.runs.style.samples import Pictures
from qzo_diffusion.system.reading import read_json
from qzo_diffusion.train.run_folder import RunFolder

FILE = "rewards.json"


@dataclass
class RewardedPictures(Pictures):
    """`runs.plan.Callbacks` of a run on rewards. It writes rewards.json in the run's folder.

    Args:
        prompts: those of the sampler.
    """

    rewards: Rewards = field(kw_only=True)
    prompts: Sequence[str] = field(kw_only=True)
    _rows: list[dict[str, Any]] = field(default_factory=list, init=False)
    _warned: bool = field(default=False, init=False)

    def drawn(self, step: int) -> list[Image.Image]:
        """Draw the pictures of a step, and score them before their grid is written: a step with a
        grid has a score."""
        images = super().drawn(step)
        try:
            self._rows = [row for row in self._earlier() if row["step"] < step]
            self._rows.append(self._scored(step, images))
            self._write()
        except UserError as error:
            self.tracker.report(f"warning: no scores at step {step}: {error.got}")
        else:
            self._warn()
        return images

    def _scored(self, step: int, images: list[Image.Image]) -> dict[str, Any]:
        trained, second = self.rewards.trained, self.rewards.second
        each = trained.each(images, self.prompts)
        row: dict[str, Any] = {"step": step, "each": each}
        if each:
            row[TRAINED] = trained.total(each)
        if second is not None:
            row[SECOND] = second(images, self.prompts)
        return row

    def _earlier(self) -> list[dict[str, Any]]:
        """Return the rows so far; a run that goes on reads those of its first part."""
        path = self.folder.parent / FILE
        if self._rows or not path.is_file():
            return self._rows
        try:
            return [dict(row) for row in read_json(path)["steps"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.tracker.report(f"warning: {path} is written anew: {error}")
            return []

    def _write(self) -> None:
        second = self.rewards.second
        content = {
            "rewards": self.rewards.trained.weights,
            SECOND: None if second is None else next(iter(second.weights)),
            "prompts": list(self.prompts),
            "steps": self._rows,
        }
        RunFolder(self.folder.parent).write_json(FILE, content)

    def _warn(self) -> None:
        if self._warned or not gamed(self._rows):
            return
        self._warned = True
        assert self.rewards.second is not None
        name = next(iter(self.rewards.second.weights))
        self.tracker.report(
            f"warning: step {self._rows[-1]['step']}: on prompts that are not trained the reward "
            f"rises and {name} falls, both for certain; look at samples/grid.png, and lower "
            "train.lr or train.max_steps, or set prior.decay or prior.weight"
        )

    def results(self) -> dict[str, Any]:
        rows = self._rows or self._earlier()
        found = {key: change(rows, key) for key in (TRAINED, SECOND) if rows and key in rows[0]}
        return super().results() | {"scores": found}
