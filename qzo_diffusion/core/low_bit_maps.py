"""Maps between the numbers that an optimizer remembers and codes of 8, 4, 3 or 2 bits.

Numbers come in blocks. A block has a unit, and each of its numbers is rounded to a level times the
unit:

* `DynamicMap`: decades of evenly spaced levels, rounded to nearest (block-wise dynamic
  quantization, arXiv 2110.02861). The unit is the number of largest magnitude with its sign, so
  that it is kept as it is.
* `LogarithmicMap`: powers of a base that each block has for itself, whose exponent is rounded at
  random (SOLO, arXiv 2505.00347). An average over many steps changes by less than half a level in
  each, and rounding to nearest would lose all changes ("signal swamping"). To round the number
  itself at random would make steps too long (docs/decisions/estimator.md D96)."""

import torch
from torch import Tensor

from qzo_diffusion.core.precision import where_float64_is
from qzo_diffusion.core.rounding import stochastic_round

QUANTILE = 0.1  # of a block's numbers lie below its lowest level (SOLO)
LOWEST = 2.0**-30  # of a block's largest number
VALID_BETA, VALID_BITS = 0.8, 4  # a momentum and a width that SOLO's authors use together


def dynamic_levels(bits: int, signed: bool) -> Tensor:
    """The 2^bits levels of the dynamic map, ascending: fp32 in (-1, 1] or [0, 1]."""
    decades = []
    for place in range(bits - 1):
        edges = torch.linspace(0.1, 1, 2 ** (place + (not signed)) + 1, dtype=torch.float64)
        decades.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (place - bits + 2))
    levels = torch.cat(decades)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    return torch.cat([*([-levels] if signed else []), levels, ends]).sort().values.float()


def steady_beta(beta: float, bits: int) -> float:
    """The momentum that a first moment of so many bits is averaged with: `beta` or less.

    With r the median of half the distances between levels, errors of rounding add as much variance
    as at VALID_BETA and VALID_BITS while β' / (1 - β') · r(bits) is at most as large as there
    (SOLO, arXiv 2505.00347).
    """
    if bits == 32:
        return beta
    radii = [dynamic_levels(one, True).diff().median().item() / 2 for one in (bits, VALID_BITS)]
    odds = VALID_BETA / (1 - VALID_BETA) * radii[1] / radii[0]
    return min(beta, odds / (1 + odds))


class DynamicMap:
    """Round to the nearest level of the dynamic map."""

    figures = 1  # that a block keeps

    def __init__(self, bits: int, signed: bool) -> None:
        self.bits, self._levels = bits, dynamic_levels(bits, signed)
        self._between = (self._levels[1:] + self._levels[:-1]) / 2

    def encode(self, blocks: Tensor, *key: int | str) -> tuple[Tensor, Tensor]:
        """fp32 [n, size] -> codes, uint8 [n, size], and units, fp32 [n, 1]; nothing is random."""
        highest, lowest = blocks.amax(1, keepdim=True), blocks.amin(1, keepdim=True)
        units = torch.where(-lowest > highest, lowest, highest)
        normal = blocks / torch.where(units == 0, 1.0, units)
        return torch.bucketize(normal, self._between.to(blocks.device)).to(torch.uint8), units

    def decode(self, codes: Tensor, figures: Tensor) -> Tensor:
        """The inverse, to the nearest level: fp32 [n, size]."""
        return self._levels.to(codes.device)[codes.int()] * figures


class LogarithmicMap:
    """Round numbers ≥ 0 to one of the two neighbouring powers of the block's base, at random: the
    exponent is right on average.

    The base is such that the lowest of 2^bits levels is the block's 10 % quantile. Smaller numbers
    get that level, the largest stays as it is.
    """

    figures = 2  # that a block keeps: unit and base

    def __init__(self, bits: int) -> None:
        self.bits, self._count = bits, 2**bits

    def encode(self, blocks: Tensor, *key: int | str) -> tuple[Tensor, Tensor]:
        """fp32 [n, size] -> codes, uint8 [n, size], and units with bases, fp32 [n, 2].

        Args:
            key: of the random numbers.
        """
        units = blocks.amax(1, keepdim=True)
        normal = blocks / torch.where(units == 0, 1.0, units)
        place = 1 + int(QUANTILE * blocks.shape[1])
        lowest = normal.kthvalue(place, dim=1, keepdim=True).values.clamp_min(LOWEST)
        exact = where_float64_is(normal).double()  # in fp32 a CPU and a GPU give other bits
        bases = where_float64_is(lowest).double().pow(1 / (self._count - 1)).float()
        # no number where all are the unit
        exponents = (exact.log() / bases.double().log()).nan_to_num(nan=0.0, posinf=self._count)
        places = exponents.clamp(0, self._count - 1).float().to(blocks.device)
        codes = stochastic_round(places.flatten(), *key).view_as(blocks)
        return codes.to(torch.uint8), torch.cat([units, bases.to(blocks.device)], 1)

    def decode(self, codes: Tensor, figures: Tensor) -> Tensor:
        """The levels that were chosen: fp32 [n, size]."""
        units, bases = figures.split(1, dim=1)
        return self._levels(bases).gather(1, codes.long()) * units

    def _levels(self, bases: Tensor) -> Tensor:
        """1, base, base², ...: fp32 [n, 2^bits], by products that are the same on any device."""
        levels = [torch.ones_like(bases)]
        for _ in range(self._count - 1):
            levels.append(levels[-1] * bases)
        return torch.cat(levels, 1)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [n] below 2^bits -> uint8 [bits · ceil(n / 8)]: eight codes fill `bits` bytes."""
    if bits == 8:
        return codes
    eights = torch.nn.functional.pad(codes, (0, -len(codes) % 8)).view(-1, 8).long()
    words = (eights << _shifts(8, bits, codes)).sum(1, keepdim=True)
    return (words >> _shifts(bits, 8, codes)).bitwise_and_(255).to(torch.uint8).flatten()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse: uint8 [count]."""
    if bits == 8:
        return packed
    words = (packed.view(-1, bits).long() << _shifts(bits, 8, packed)).sum(1, keepdim=True)
    codes = (words >> _shifts(8, bits, packed)).bitwise_and_(2**bits - 1)
    return codes.to(torch.uint8).flatten()[:count]


def _shifts(count: int, step: int, like: Tensor) -> Tensor:
    return torch.arange(0, count * step, step, device=like.device)
