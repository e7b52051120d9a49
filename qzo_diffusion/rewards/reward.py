"""A reward: a score of finished pictures, higher is better."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from qzo_diffusion.core.errors import UserError


class RewardError(UserError):
    """A reward could not score the pictures of a step; what was trained before is whole."""


class Reward(Protocol):
    """Score RGB pictures, one number for each; `prompts` has the prompt of each picture.

    A number that is not finite leaves out the directions of its picture.
    """

    def __call__(
        self, pictures: Sequence[Image.Image], prompts: Sequence[str]
    ) -> Sequence[float]: ...


@dataclass(frozen=True)
class Weighted:
    """The sum of several rewards, each times its weight.

    Args:
        rewards: by name, as the user wrote it.
        weights: by the same names.
    """

    rewards: Mapping[str, Reward]
    weights: Mapping[str, float]

    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        return self.total(self.each(pictures, prompts))

    def total(self, found: Mapping[str, Sequence[float]]) -> list[float]:
        """Return the weighted sum of the values of `each`; NaN where one is not finite."""
        pictures = zip(*found.values(), strict=True)
        weights = [self.weights[name] for name in found]
        return [
            math.fsum(w * value for w, value in zip(weights, values, strict=True))
            if all(map(math.isfinite, values))
            else math.nan
            for values in pictures
        ]

    def each(
        self, pictures: Sequence[Image.Image], prompts: Sequence[str]
    ) -> dict[str, list[float]]:
        """Return the values of every reward by name, before weights.

        Raises:
            RewardError: one gave another number of values than there are pictures.
        """
        return {
            name: checked(name, reward(pictures, prompts), len(pictures))
            for name, reward in self.rewards.items()
        }


def checked(name: str, values: Sequence[float], count: int) -> list[float]:
    """Return the values as floats. Raises RewardError unless there are `count` numbers."""
    try:
        found = [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise RewardError(
            f"the reward {name} gave {type(values).__name__} with {error}",
            f"{count} numbers, one for each picture",
            "correct it, then go on with --resume",
        ) from None
    if len(found) != count:
        raise RewardError(
            f"{len(found)} values of the reward {name} for {count} pictures",
            "one for each picture",
            "correct it, then go on with --resume",
        )
    return found
