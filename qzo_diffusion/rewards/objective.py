"""The objective of a run on rewards: draw the pictures of a micro-batch, score them, and return
minus the scores as losses.

Drawing and scoring are two functions that know nothing of each other:

    draw    PictureBatch -> pictures, by the transformer as it is: under a probe, a picture for
            each row, by that row's factors (`rewards.drawing.Drawer.pictures`)
    score   pictures, prompts -> a number for each, higher is better (`rewards.reward.Reward`)

Where losses come later than pictures, as choices of a person do, a step is probed twice. The order
of objective calls and of pictures in a call is the same both times (`core.probes.Probes`):

    kept = Kept(draw)                    # loss 0 for every picture
    spsa.probe(kept, batch, ...)         # draws all pictures of the step under its probes
    ... a person looks at kept.calls and chooses ...
    spsa.probe(Told(losses), batch, ...) # evaluates nothing; gives the derivatives of those losses

With antithetic probing, one direction for each example and room for two rows, a call has the
pictures at +ε of its examples, then those at -ε of the same examples in the same order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

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


@dataclass
class Kept:
    """An objective that only draws, and keeps the pictures and prompts of every call."""

    draw: Draw
    calls: list[tuple[list[Image.Image], tuple[str, ...]]] = field(default_factory=list)

    def __call__(self, batch: PictureBatch) -> Tensor:
        self.calls.append((self.draw(batch), batch.texts))
        return torch.zeros(len(batch), dtype=torch.float64)


class Told:
    """An objective that evaluates nothing.

    Args:
        losses: for each call the losses of its pictures, in the order of `Kept.calls`.
    """

    def __init__(self, losses: Sequence[Sequence[float]]) -> None:
        self._losses = iter(losses)

    def __call__(self, batch: PictureBatch) -> Tensor:
        return torch.tensor(list(next(self._losses)), dtype=torch.float64)
