"""Keep the packed signs of a step's directions on the device.

They are needed at +ε, at -ε and in the update, layer by layer. Drawing them costs the most,
and on a GPU sending them."""

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
    """The signs of some directions for one tensor, or for several layers."""

    name: Hashable
    directions: tuple[Direction, ...]
    bits: Tensor


class SignCache:
    """Signs by name and direction: 1/32 of the memory of θ for each direction kept.

    Signs of the directions asked for last all stay. Older ones go when `limit` bytes are passed,
    and all go when another step's are asked for.
    """

    def __init__(self, limit: int = 2**25) -> None:
        self._limit = limit
        self._forget()

    def packed(
        self,
        directions: Sequence[Direction],
        name: Hashable,
        draw: Callable[[Direction], PackedBits],
        device: torch.device,
        keep: bool = True,
    ) -> Tensor:
        """The signs of several directions, [directions, *shape of a draw], on `device`.

        Args:
            name: of the tensor or layers that they belong to.
            draw: draws those that are not kept.
            keep: whether the same will be asked for again.
        """
        asked = tuple(directions)
        if self._by_age and _step(self._by_age[-1].directions) != _step(asked):
            self._forget()
        known = self._by_name.get(name, [])
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
        self._by_name: dict[Hashable, list[_Group]] = {}
        self._bytes = 0


def _step(directions: tuple[Direction, ...]) -> tuple[int, int]:
    return directions[0].seed, directions[0].step
