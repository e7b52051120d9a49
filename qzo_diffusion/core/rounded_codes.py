"""QuZO along few directions: integer codes times factors of rows and columns, rounded to the grid.

    c(θ) = clamp(⌊c0 · exp(row[o] + column[block of k]) + u⌋),     u in (0, 1) from a fixed draw

A probe is QZO's: factors scale a layer's inputs and outputs, so each example has its own direction
and no weight-sized noise is drawn. The scales of the grid stay. The codes of the base stay in
memory until the run ends, and θ holds what the codes have not reached: an update is never lost, and
no rounding error adds up over steps. E[c(θ)] over u is c0 · exp(θ) within the range, to 2^-9 of a
code. A code that would leave the range stays at its limit.

A draw for every weight and step (`core.quzo`) takes most of a step's time, and one direction for a
whole batch has more noise (docs/decisions/rates.md D90)."""

import math
from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from qzo_diffusion.core.bits import to_device
from qzo_diffusion.core.noise import packed_bits
from qzo_diffusion.core.quzo import BLOCK, Grid
from qzo_diffusion.core.scales import ScaleSet
from qzo_diffusion.core.stored import Axis


class Ladder(Grid, Protocol):
    """A grid whose codes stand for numbers in rising order."""

    def values(self, codes: Tensor) -> Tensor:
        """Codes -> what they stand for, in units of the scale."""
        ...

    def places(self, values: Tensor) -> Tensor:
        """The inverse, linear between the numbers of two neighbouring codes."""
        ...


class RoundedCodes:
    """Codes times factors, rounded: `core.grouped.Stored` of layers on a grid.

    Args:
        scales: the live codes as they are stored, in the place of scales; they hold the base.
        grids: how each layer stores them.
        blocksize: neighbouring inputs that share a factor; of a layer whose inputs it does not
            divide, their greatest common divisor.
    """

    rounds = True

    def __init__(self, scales: ScaleSet, grids: Mapping[str, Ladder], blocksize: int) -> None:
        self._scales, self._grids, self._blocksize = scales, grids, blocksize

    def columns(self, name: str) -> int:
        inputs = self._scales[name].shape[1] * self._grids[name].per_byte
        return int(inputs // math.gcd(inputs, self._blocksize))

    def times(self, name: str, factors: Mapping[Axis, Tensor]) -> Tensor:
        live, grid = self._scales[name], self._grids[name]
        rounded = torch.empty_like(live)
        for index, rows in enumerate(_parts(live, grid.per_byte)):
            numbers = grid.values(grid.codes(live[rows])).clone()
            for axis, factor in factors.items():
                _multiply_(numbers, axis, factor[rows] if axis == "row" else factor)
            places = grid.places(numbers)
            codes = places.add_(_dither(places, name, index)).floor_()
            rounded[rows] = grid.stored(codes.clamp_(grid.low, grid.high))
        return rounded


def _parts(stored: Tensor, per_byte: int) -> Iterator[slice]:
    """Slices of rows of about `BLOCK` codes."""
    rows = max(1, BLOCK // (stored.shape[1] * per_byte))
    return (slice(start, start + rows) for start in range(0, len(stored), rows))


def _multiply_(numbers: Tensor, axis: Axis, factor: Tensor) -> None:
    """numbers [n, K] *= the factors of their rows [n], of blocks of columns, or of the layer."""
    if axis == "row":
        numbers.mul_(factor.unsqueeze(1))
    else:
        numbers.view(len(numbers), len(factor), -1).mul_(factor.unsqueeze(1))


def _dither(like: Tensor, name: str, index: int) -> Tensor:
    """u for each code of a part: (byte + 1/2) / 256, the same in every run."""
    drawn = packed_bits(8 * like.numel(), "dither", name, index)[: like.numel()]
    return to_device(drawn, like.device).view(like.shape).to(like.dtype).add_(0.5).div_(256)
