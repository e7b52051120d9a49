"""Packed signs of a step's directions, where their numbers are.

They are needed at +ε, at -ε and in the update, layer by layer; drawing costs the most, and on a GPU sending.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qzo_diffusion.core.bits import sent
from qzo_diffusion.core.noise import Direction


@dataclass(eq=False)
class _Group:
    """What some directions are for the numbers of one name."""

    name: str
    directions: tuple[Direction, ...]
    bits: Tensor


class SignCache:
    """A bit a number, so 1/32 of the trained numbers for each direction kept.

    Those of the directions asked for last all stay; older ones go when `limit` bytes are passed, and all when another step's are
    asked for.
    """

    def __init__(self, limit: int = 2**25) -> None:
        self._limit = limit
        self._forget()

    def packed(self, directions: Sequence[Direction], name: str, like: Tensor, each: bool = False, keep: bool = True) -> Tensor:
        """uint8 [directions, bytes], with `each` [directions, regions, bytes], on the device of `like`, for as many numbers.

        keep: whether the same will be asked for again.
        """
        asked = tuple(directions)
        if self._by_age and _step(self._by_age[-1].directions) != _step(asked):
            self._forget()
        known = self._by_name.get(name, [])
        for group in known:
            if group.directions == asked:
                return group.bits
        rows = {direction: bits for group in known for direction, bits in zip(group.directions, group.bits, strict=True)}
        missing = [direction for direction in asked if direction not in rows]
        if missing:
            drawn = np.stack([direction.packed(name, like.numel(), each) for direction in missing])
            rows.update(zip(missing, sent(drawn, like.device), strict=True))
        bits = torch.stack([rows[direction] for direction in asked])
        if keep:
            self._keep(_Group(name, asked, bits))
        return bits

    def _keep(self, group: _Group) -> None:
        self._by_age.append(group)
        self._by_name.setdefault(group.name, []).append(group)
        self._bytes += group.bits.numel()
        while self._bytes > self._limit and self._by_age[0].directions != group.directions:
            oldest = self._by_age.popleft()
            self._by_name[oldest.name].remove(oldest)
            self._bytes -= oldest.bits.numel()

    def _forget(self) -> None:
        self._by_age: deque[_Group] = deque()
        self._by_name: dict[str, list[_Group]] = {}
        self._bytes = 0


def _step(directions: tuple[Direction, ...]) -> tuple[int, int]:
    return directions[0].seed, directions[0].step
