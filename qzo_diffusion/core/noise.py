"""Random directions z that are never stored: drawn again from (run seed, step, direction, tensor name) whenever needed.

The bits come from a counter-based generator (Philox, through numpy, whose bit stream is fixed across versions and machines),
keyed by a hash, so any tensor's z can be drawn alone, in any order, on any rank. Rejected: `torch.randn` after a seed. Its
stream differs between CPU and CUDA, is not chunk-invariant, and seeding it three times a step would also reset everyone else's
noise. Rademacher z = ±1 is the default direction: one bit a number, exact in any precision, and the least variance of zᵀHz
(Spall 1992). Gaussian z follows the papers; numpy may change its Gaussian stream between versions, so it is not portable.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Distribution = Literal["rademacher", "gaussian"]
PackedBits = NDArray[np.uint8]


def derive_key(*parts: int | str, bits: int = 128) -> int:
    """A key of `bits` bits from any number of parts, the same on every machine (blake2b, never `hash()`)."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=bits // 8).digest(), "little")


def torch_generator(*parts: int | str) -> torch.Generator:
    """A CPU generator of its own for data noise and noise levels; the global random state is never touched."""
    return torch.Generator().manual_seed(derive_key(*parts, bits=64) >> 1)


def _philox(*parts: int | str) -> np.random.Philox:
    return np.random.Philox(key=derive_key(*parts))


def packed_bits(numel: int, *parts: int | str) -> PackedBits:
    """uint8 [8 · words]: the Philox words that hold `numel` bits, little-endian, so that the lowest bit of a word comes first."""
    words = _philox(*parts).random_raw((numel + 63) // 64)
    return np.ascontiguousarray(words, dtype="<u8").view(np.uint8)


_BITS_OF_BYTE = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little").astype(bool)


def choose(
    packed: PackedBits, pairs: Sequence[tuple[float, float]], like: Tensor, start: int = 0, stop: int | None = None
) -> Tensor:
    """uint8 [..., bytes] -> [pairs, ..., stop - start] in the dtype and on the device of `like`: one of two constants a bit.

    `pairs` are (if set, if clear). A table gives eight numbers for a byte at once: ten times faster than unpacking the bits.
    """
    stop = 8 * packed.shape[-1] if stop is None else stop
    packed, skipped = packed[..., start // 8 : (stop + 7) // 8], start - start % 8
    tables = [_table(pair, like.dtype, like.device) for pair in pairs]
    if like.device.type == "cpu":
        chosen = torch.empty(len(pairs), *packed.shape, 8, dtype=like.dtype)
        for table, part in zip(tables, chosen.numpy(), strict=True):
            np.take(table.numpy(), packed, axis=0, out=part, mode="clip")  # in any other mode numpy fills a buffer and copies it
    else:  # a bit a number travels
        bits = _sent(packed, like.device).int()
        chosen = torch.stack([table[bits] for table in tables])
    return chosen.flatten(-2)[..., start - skipped : stop - skipped]


@lru_cache(maxsize=16)
def _table(pair: tuple[float, float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[256, 8]: what the bits of each byte choose."""
    return torch.from_numpy(np.where(_BITS_OF_BYTE, *pair)).to(dtype).to(device)


def _sent(packed: PackedBits, device: torch.device) -> Tensor:
    """On the device; from memory that a GPU reads by itself, else the processor would wait for all that is queued before it."""
    bits = torch.from_numpy(np.ascontiguousarray(packed))
    return bits.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else bits.to(device)


_SUM_BITS = 39  # of an amount; with 2^13 amounts a sum has 52, which float64 holds exactly


def signed_sum(packed: PackedBits, amounts: Sequence[float], like: Tensor) -> Tensor:
    """Σ amounts[i] · z_i for the signs z of packed [n, bytes]: float64 [numbers of `like`], on its device.

    Amounts are rounded to whole multiples of a power of two, 2^-39 of the largest, so the sums are exact: the same on every
    machine, in any order, with any number of threads, and a product of matrices may form them.
    """
    largest = max(map(abs, amounts))
    if largest == 0:
        return torch.zeros(like.numel(), dtype=torch.float64, device=like.device)
    unit = 2.0 ** (math.frexp(largest)[1] - _SUM_BITS)
    whole = torch.tensor([round(amount / unit) for amount in amounts], dtype=torch.float64, device=like.device)
    total = torch.zeros(like.numel(), dtype=torch.float64, device=like.device)
    # Some at a time: the signs of all would fit into no cache. 2 MB on a CPU; a GPU would rather be called less often.
    at_once = 2**13 if like.device.type == "cpu" else 2**17
    for first in range(0, like.numel(), at_once):
        place = slice(first, min(first + at_once, like.numel()))
        for part in (slice(start, start + 32) for start in range(0, len(amounts), 32)):
            total[place] += whole[part] @ choose(packed[part], [(1.0, -1.0)], total, place.start, place.stop)[0]
    return total * unit


@dataclass(frozen=True)
class Direction:
    """One random direction over all trained numbers.

    Args:
        seed: of the run.
        step: counted from 0.
        index: of the direction within its step.
        distribution: "rademacher" or "gaussian".
        regions: how many z of their own the regions of an example have for the numbers of pointwise layers (`core.grouped`).
    """

    seed: int
    step: int
    index: int = 0
    distribution: Distribution = "rademacher"
    regions: int = 1

    def z(self, name: str, like: Tensor, each: bool = False) -> Tensor:
        """z for the tensor `name`: shape, dtype and device of `like`; mean 0, variance 1. With `each`, [regions, *shape]."""
        if self.distribution == "gaussian":
            return self._gaussian(name, like, each)
        return self._choose(name, like, each, 1.0, -1.0)

    def exp_z(self, name: str, like: Tensor, radius: float, each: bool = False) -> Tensor:
        """exp(radius · z). For Rademacher z one of two constants computed in float64, so no `exp` runs over a tensor."""
        if self.distribution == "gaussian":
            return torch.exp(radius * self._gaussian(name, like, each))
        return self._choose(name, like, each, math.exp(radius), math.exp(-radius))

    def packed(self, name: str, numel: int, each: bool = False) -> PackedBits:
        """The bits of `numel` Rademacher signs of the tensor `name`, eight a byte; with `each`, [regions, bytes of whole words]."""
        if not each:
            return packed_bits(numel, self.seed, self.step, self.index, name)
        padded = -(-numel // 64) * 64
        return packed_bits(self.regions * padded, self.seed, self.step, self.index, name).reshape(self.regions, -1)

    def _choose(self, name: str, like: Tensor, each: bool, if_set: float, if_clear: float) -> Tensor:
        chosen = choose(self.packed(name, like.numel(), each), [(if_set, if_clear)], like, 0, like.numel())
        return chosen.view(self.regions, *like.shape) if each else chosen.view(like.shape)

    def _gaussian(self, name: str, like: Tensor, each: bool) -> Tensor:
        generator = np.random.Generator(_philox(self.seed, self.step, self.index, name))
        values = generator.standard_normal((self.regions, *like.shape) if each else tuple(like.shape), dtype=np.float32)
        return torch.from_numpy(values).to(device=like.device, dtype=like.dtype)


def directions_of_step(seed: int, step: int, count: int, distribution: Distribution, regions: int = 1) -> tuple[Direction, ...]:
    return tuple(Direction(seed, step, index, distribution, regions) for index in range(count))


class SignCache:
    """Packed bits of a step's directions, which are needed at +ε, at -ε and in the update: drawing costs the most.

    A bit a number, so 1/32 of the trained numbers for each direction kept. All go when another step's are asked for, the oldest
    when `limit` bytes are passed.
    """

    def __init__(self, limit: int = 2**25) -> None:
        self._limit, self._bytes = limit, 0
        self._known: dict[Direction, dict[str, PackedBits]] = {}

    def packed(self, direction: Direction, name: str, numel: int, each: bool = False) -> PackedBits:
        newest = next(reversed(self._known), direction)
        if (newest.seed, newest.step) != (direction.seed, direction.step):
            self._known, self._bytes = {}, 0
        of_direction = self._known.setdefault(direction, {})
        found = of_direction.get(name)
        if found is None:
            found = of_direction[name] = direction.packed(name, numel, each)
            self._bytes += found.nbytes
            while self._bytes > self._limit and len(self._known) > 1:
                oldest = next(iter(self._known))
                if oldest == direction:  # the one in use was the first to come
                    self._known[direction] = self._known.pop(direction)
                    continue
                self._bytes -= sum(bits.nbytes for bits in self._known.pop(oldest).values())
        return found
