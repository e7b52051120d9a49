"""Settings of a run that is tuned by scores of finished pictures, and the names of rewards."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from qzo_diffusion import resources
from qzo_diffusion.config.kinds import Count, NotNegative, PathOrName, Positive
from qzo_diffusion.config.sections import Section

# name -> words for its argument; None takes none, and in brackets it may be left out
REWARDS: dict[str, str | None] = {
    "clip_score": "[MODEL/PRETRAINED of open_clip, a folder, or embedded]",
    "style": "a folder of pictures",
    "aesthetic": "a safetensors file with a linear head",
    "preference": "pickscore or hpsv2",
    "compressibility": None,
    "incompressibility": None,
    "colourfulness": None,
    "brightness": None,
    "python": "FILE.py:FUNCTION",
    "command": "a program and its arguments",
    "votes": None,  # choices of a person, by `qzo-diffuse vote`
}
VOTES = "votes"
_PATHS = ("style", "aesthetic", "python")  # whose argument begins with a path
_PREFERENCES = ("pickscore", "hpsv2")
_WEIGHT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)
NO_SECOND = "none"


@dataclass(frozen=True)
class RewardName:
    """NAME[:ARG][=WEIGHT] in its parts; a weight is what follows the last `=` if it is a number."""

    name: str
    argument: str | None
    weight: float

    @classmethod
    def parse(cls, text: str) -> "RewardName":
        """Raises ValueError for an unknown name, or an argument that is missing or too much."""
        head, equals, tail = text.rpartition("=")
        has_weight = bool(equals) and _WEIGHT.fullmatch(tail.strip()) is not None
        name, colon, argument = (head if has_weight else text).partition(":")
        found = cls(name, argument if colon else None, float(tail) if has_weight else 1.0)
        found._check(text)
        return found

    def _check(self, text: str) -> None:
        if self.name not in REWARDS:
            raise ValueError(f"NAME[:ARG][=WEIGHT] with a NAME of {', '.join(REWARDS)}")
        words = REWARDS[self.name]
        if words is None and self.argument is not None:
            raise ValueError(f"{self.name} without an argument")
        if words is not None and not words.startswith("[") and not (self.argument or "").strip():
            raise ValueError(f"{self.name}:ARG, where ARG is {words}")
        if self.name == "preference" and self.argument not in _PREFERENCES:
            raise ValueError(f"preference:{' or preference:'.join(_PREFERENCES)}")
        if self.name == "python" and not self.function[1]:
            raise ValueError("python:FILE.py:FUNCTION")
        if self.name == VOTES and self.weight != 1:
            raise ValueError("votes without a weight")
        if not abs(self.weight) > 0:
            raise ValueError("a weight other than 0")

    @property
    def function(self) -> tuple[str, str]:
        """File and function of `python:FILE.py:FUNCTION`."""
        file, _, function = (self.argument or "").rpartition(":")
        return file, function if file else ""

    @property
    def text(self) -> str:
        """The whole name again, without a weight of 1."""
        argument = "" if self.argument is None else f":{self.argument}"
        return f"{self.name}{argument}" + ("" if self.weight == 1 else f"={self.weight:g}")

    def with_whole_path(self) -> "RewardName":
        """The same with a path that begins at the root."""
        argument = self.argument or ""
        is_folder = self.name == "clip_score" and argument and Path(argument).is_dir()
        if self.name not in _PATHS and not is_folder:
            return self
        whole = str(Path(resources.expand_home(argument)).absolute())
        return RewardName(self.name, whole, self.weight)


def _known(text: str) -> str:
    RewardName.parse(text)
    return text


def _once_each(texts: list[str]) -> list[str]:
    names = [(one.name, one.argument) for one in map(RewardName.parse, texts)]
    if len(set(names)) < len(names):
        raise ValueError("each reward once")
    if (VOTES, None) in names and len(names) > 1:
        raise ValueError("votes alone, without other rewards")
    return texts


def _known_or_none(text: str) -> str:
    if text == VOTES:
        raise ValueError("a reward that is computed, or none")
    return text if text == NO_SECOND else _known(text)


class RewardConfig(Section):
    scores: Annotated[list[str], AfterValidator(_once_each)] = Field(default_factory=list)
    """rewards of finished pictures, NAME[:ARG][=WEIGHT] each; empty: a style folder is learnt"""
    prompts: PathOrName | None = None
    """file with one prompt a line, whose pictures are scored in training"""
    steps: Count | None = None
    """sampling steps of a picture that is scored; null: 8, or sample.steps where those are fewer"""
    guidance: NotNegative | None = None
    """guidance scale of a picture that is scored; null: that of sample.guidance"""
    normalize: bool = True
    """divide the derivatives of a prompt's picture by their rms over its own directions"""
    scorer: str | None = None
    """open_clip model of clip_score, style and aesthetic; null: as suits the model"""
    second: Annotated[str, AfterValidator(_known_or_none)] | None = None
    """a reward that is only reported, on the prompts of sample.prompts; null: clip_score, unless it
    is a reward; none: no second one"""
    decode_at_once: Count = 4
    """pictures that the VAE decodes together in training"""
    seconds: Positive = 300.0
    """time limit of one call of a python or command reward"""

    @property
    def by_votes(self) -> bool:
        """Whether a person chooses between pictures."""
        return self.scores == [VOTES]

    @property
    def names(self) -> Sequence[RewardName]:
        return [RewardName.parse(text) for text in self.scores]
