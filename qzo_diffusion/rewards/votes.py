"""Pairs of pictures that a person chooses from, the choices as losses, and the file that keeps
them.

The two pictures of a pair have the same prompt and noise; one is drawn at +ε along the pair's
direction, the other at -ε.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar, get_args

import torch

from qzo_diffusion.core.errors import OutputError
from qzo_diffusion.core.noise import torch_generator
from qzo_diffusion.system.reading import parse_json, read_json_lines

Choice = Literal["left", "right", "equal"]
CHOICES: tuple[Choice, ...] = get_args(Choice)
Side = TypeVar("Side")


@dataclass(frozen=True)
class Pair:
    """One pair of a round.

    Attributes:
        place: its place in the round, from 0.
        plus_is_left: whether the picture at +ε stands left. Sides are drawn, so that a person who
            favours one side only adds noise.
    """

    place: int
    prompt: str
    plus_is_left: bool

    def sides(self, plus: Side, minus: Side) -> tuple[Side, Side]:
        """Return what stands left and right."""
        return (plus, minus) if self.plus_is_left else (minus, plus)

    def losses(self, choice: Choice) -> tuple[float, float]:
        """Return the losses at +ε and at -ε: -1 of the chosen picture, 1 of the other, 0 of equal
        ones.
        """
        left = {"left": -1.0, "right": 1.0, "equal": 0.0}[choice]
        return self.sides(left, -left if left else 0.0)


def pairs_of_round(prompts: Sequence[str], seed: int, step: int) -> list[Pair]:
    """Return the pairs of a step, with sides that follow from (seed, step)."""
    drawn = torch.randint(2, (len(prompts),), generator=torch_generator(seed, step, "sides"))
    sides: list[bool] = drawn.bool().tolist()
    return [
        Pair(at, text, left) for at, (text, left) in enumerate(zip(prompts, sides, strict=True))
    ]


class VoteFile:
    """votes.jsonl of a run: a line for each choice, {round, pair, choice}, in the order in which
    they were made.

    Rounds and pairs count from 1. A choice that was taken back is null. A line is on the disk when
    `add` returns.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def of_round(self, step: int) -> dict[int, Choice]:
        """Return the choices of a step by place. Raises OutputError for a damaged file."""
        found: dict[int, Choice] = {}
        for line in self._lines():
            at, pair, choice = (line.get(key) for key in ("round", "pair", "choice"))
            if at != step + 1 or not isinstance(pair, int):
                continue
            found.pop(pair - 1, None)
            if choice in CHOICES:
                found[pair - 1] = choice
        return found

    def add(self, step: int, place: int, choice: Choice | None) -> None:
        """Append a choice. Raises OutputError where the disk does not take it."""
        line = {"round": step + 1, "pair": place + 1, "choice": choice}
        try:
            with self._path.open("ab+") as file:
                _cut_torn_line(file.fileno())
                file.write(json.dumps(line).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(
                f"{self._path} can't be written: {error.strerror or error}",
                "a place with room for the choices",
                "free space or correct the permissions, then give the same command; all choices "
                "before this one are safe",
            ) from error

    def _lines(self) -> list[Mapping[str, object]]:
        if not self._path.exists():
            return []
        try:
            found = [parse_json(line) for line in read_json_lines(self._path)]
            if not all(isinstance(line, dict) for line in found):
                raise ValueError("a line that holds no object")
        except (OSError, ValueError) as error:
            raise OutputError(
                f"{self._path} is damaged: {error}",
                "a line for each choice",
                "restore it, or remove its last line; finished rounds are in the journal",
            ) from None
        return found


def _cut_torn_line(file: int) -> None:
    """Cut off the part of a line that a kill left at the end."""
    size = os.fstat(file).st_size
    end = os.pread(file, 4096, max(0, size - 4096))
    if end and not end.endswith(b"\n"):
        os.ftruncate(file, size - len(end) + end.rfind(b"\n") + 1)
