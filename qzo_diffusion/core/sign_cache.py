"""Packed signs of a step's directions, where their numbers are.

They are needed at +ε, at -ε and in the update, layer by layer; drawing costs the most, and on a GPU
sending."""

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qzo_diffusion.core.bits import PackedBits, to_device
from qzo_diffusion.core.noise import Direction


@dataclass(eq=False)
class _Group:
    """What some directions are for some numbers."""

    theta: Hashable
    directions: tuple[Direction, ...]
    bits: Tensor


class SignCache:
    """A bit a number, so 1/32 of the trained numbers for each direction kept.

    Those of the directions asked for last all stay; older ones go when `limit` bytes are passed,
    and all when another step's are asked for.
    """

    def __init__(self, limit: int = 2**25) -> None:
        self._limit = limit
        self._forget()

    def packed(
        self,
        directions: Sequence[Direction],
        theta: Hashable,
        draw: Callable[[Direction], PackedBits],
        device: torch.device,
        keep: bool = True,
    ) -> Tensor:
        """[directions, *what `draw` gives of one], on `device`.

        numbers: says of which numbers they are the signs. keep: whether the same will be asked for
        again."""
        asked = tuple(directions)
        if self._by_age and _step(self._by_age[-1].directions) != _step(asked):
            self._forget()
        known = self._of_numbers.get(theta, [])
        for group in known:
            if group.directions == asked:
                return group.bits
        rows = {
            direction: bits
            for group in known
            for direction, bits in zip(group.directions, group.bits, strict=True)
        }
        missing = [direction for direction in asked if direction not in rows]
        if missing:
            drawn = np.stack([draw(direction) for direction in missing])
            rows.update(zip(missing, to_device(drawn, device), strict=True))
        bits = torch.stack([rows[direction] for direction in asked])
        if keep:
            self._keep(_Group(theta, asked, bits))
        return bits

    def _keep(self, group: _Group) -> None:
        self._by_age.append(group)
        self._of_numbers.setdefault(group.theta, []).append(group)
        self._bytes += group.bits.numel()
        while self._bytes > self._limit and self._by_age[0].directions != group.directions:
            oldest = self._by_age.popleft()
            self._of_numbers[oldest.theta].remove(oldest)
            self._bytes -= oldest.bits.numel()

    def _forget(self) -> None:
        self._by_age: deque[_Group] = deque()
        self._of_numbers: dict[Hashable, list[_Group]] = {}
        self._bytes = 0


def _step(directions: tuple[Direction, ...]) -> tuple[int, int]:
    return directions[0].seed, directions[0].step
