"""The objective of a run on rewards: draw the pictures of a micro-batch, score them, and return
minus the scores as losses.

Drawing and scoring are two functions that know nothing of each other:

    draw    PictureBatch -> pictures, by the transformer as it is: under a probe, a picture for
            each row, by that row's factors (`rewards.drawing.Drawer.pictures`)
    score   pictures, prompts -> a number for each, higher is better (`rewards.reward.Reward`)

Where losses come later than pictures, as choices of a person do, a step is probed twice. The order
of pictures is the same both times (`core.probes.Probes`):

    spsa.probe(Shown(draw, show), batch, ...)  # draws the pictures of the step under its probes
    ... a person looks and chooses ...
    spsa.probe(Told(losses), batch, ...)       # draws nothing; the derivatives of those losses

With antithetic probing, one direction for each example and micro-batches of one example, the
pictures of an example follow each other: at +ε, then at -ε.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

import torch
from PIL import Image
from torch import Tensor

from qzo_diffusion.rewards.pictures import PictureBatch
from qzo_diffusion.rewards.reward import Reward

Draw = Callable[[PictureBatch], list[Image.Image]]


@dataclass(frozen=True)
class RewardObjective:
    """Losses [B] fp64 of a batch: minus the scores of its pictures."""

    draw: Draw
    score: Reward

    def __call__(self, batch: PictureBatch) -> Tensor:
        scores = self.score(self.draw(batch), batch.texts)
        return -torch.tensor(list(scores), dtype=torch.float64)


@dataclass(frozen=True)
class Shown:
    """An objective that only draws: every loss is 0.

    Args:
        show: gets the pictures of a call and their prompts.
        skip: whether the next so many pictures are not wanted; they are neither drawn nor shown.
    """

    draw: Draw
    show: Callable[[list[Image.Image], tuple[str, ...]], None]
    skip: Callable[[int], bool] = lambda count: False

    def __call__(self, batch: PictureBatch) -> Tensor:
        if not self.skip(len(batch)):
            self.show(self.draw(batch), batch.texts)
        return torch.zeros(len(batch), dtype=torch.float64)


class Told:
    """An objective that draws nothing.

    Args:
        losses: of all pictures, in the order in which `Shown` draws them.
    """

    def __init__(self, losses: Iterable[float]) -> None:
        self._losses = iter(losses)

    def __call__(self, batch: PictureBatch) -> Tensor:
        return torch.tensor(list(islice(self._losses, len(batch))), dtype=torch.float64)
