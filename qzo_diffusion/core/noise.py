"""Random directions z that are never stored: drawn again from (run seed, step, direction, tensor name) whenever needed.

The bits come from a counter-based generator (Philox, through numpy, whose bit stream is fixed across versions and machines),
keyed by a hash, so any tensor's z can be drawn alone, in any order, on any rank. Rejected: `torch.randn` after a seed. Its
stream differs between CPU and CUDA, is not chunk-invariant, and seeding it three times a step would also reset everyone else's
noise. Rademacher z = ±1 is the default direction: one bit a number, exact in any precision, and the least variance of zᵀHz
(Spall 1992). Gaussian z follows the papers; numpy may change its Gaussian stream between versions, so it is not portable.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Distribution = Literal["rademacher", "gaussian"]


def derive_key(*parts: int | str, bits: int = 128) -> int:
    """A key of `bits` bits from any number of parts, the same on every machine (blake2b, never `hash()`)."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=bits // 8).digest(), "little")


def torch_generator(*parts: int | str) -> torch.Generator:
    """A CPU generator of its own for data noise and noise levels; the global random state is never touched."""
    return torch.Generator().manual_seed(derive_key(*parts, bits=64) >> 1)


def _philox(*parts: int | str) -> np.random.Philox:
    return np.random.Philox(key=derive_key(*parts))


def random_bits(numel: int, device: torch.device, *parts: int | str) -> Tensor:
    """bool [numel]; the 64 bits of each Philox word in little-endian order, lowest bit first."""
    words = _philox(*parts).random_raw((numel + 63) // 64)
    packed = np.ascontiguousarray(words, dtype="<u8").view(np.uint8)
    if device.type == "cpu":
        return torch.from_numpy(np.unpackbits(packed, count=numel, bitorder="little")).view(torch.bool)
    on_device = torch.from_numpy(packed).to(device)  # an eighth of the traffic of sending the unpacked bits
    places = torch.arange(8, dtype=torch.uint8, device=device)
    return on_device.unsqueeze(1).bitwise_right_shift(places).bitwise_and(1).view(-1)[:numel].bool()


@dataclass(frozen=True)
class Direction:
    """One random direction over all trained numbers.

    Args:
        seed: of the run.
        step: counted from 0.
        index: of the direction within its step.
        distribution: "rademacher" or "gaussian".
    """

    seed: int
    step: int
    index: int = 0
    distribution: Distribution = "rademacher"

    def z(self, name: str, like: Tensor) -> Tensor:
        """z for the tensor `name`: shape, dtype and device of `like`; mean 0, variance 1."""
        if self.distribution == "gaussian":
            return self._gaussian(name, like)
        return self._choose(name, like, 1.0, -1.0)

    def exp_z(self, name: str, like: Tensor, radius: float) -> Tensor:
        """exp(radius · z). For Rademacher z one of two constants computed in float64, so no `exp` runs over a tensor."""
        if self.distribution == "gaussian":
            return torch.exp(radius * self._gaussian(name, like))
        return self._choose(name, like, math.exp(radius), math.exp(-radius))

    def bits(self, name: str, like: Tensor) -> Tensor:
        """bool, in the shape and on the device of `like`: where a Rademacher z is +1."""
        return random_bits(like.numel(), like.device, self.seed, self.step, self.index, name).view(like.shape)

    def _choose(self, name: str, like: Tensor, if_set: float, if_clear: float) -> Tensor:
        return torch.where(self.bits(name, like), like.new_tensor(if_set), like.new_tensor(if_clear))

    def _gaussian(self, name: str, like: Tensor) -> Tensor:
        generator = np.random.Generator(_philox(self.seed, self.step, self.index, name))
        values = generator.standard_normal(like.numel(), dtype=np.float32)
        return torch.from_numpy(values).view(like.shape).to(device=like.device, dtype=like.dtype)


def directions_of_step(seed: int, step: int, count: int, distribution: Distribution) -> tuple[Direction, ...]:
    return tuple(Direction(seed, step, index, distribution) for index in range(count))
