"""Random directions z, drawn again from (run seed, step, direction, tensor name) whenever needed
and never stored.

The bits come from a counter-based generator (Philox, through numpy, whose bit stream is fixed
across versions and machines; `torch.randn` has another on CUDA), keyed by a hash, so any tensor's z
can be drawn alone, in any order, on any rank. Rademacher z = ±1 is the default direction: one bit
an element, exact in any precision, and the least variance of zᵀHz (Spall 1992). Gaussian z follows
the papers; numpy may change its Gaussian stream between versions, so it is not portable."""

import hashlib
import threading
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from qzo_diffusion.core.bits import PackedBits, exp_pair, select, to_device

Distribution = Literal["rademacher", "gaussian"]


def derive_key(*parts: int | str, bits: int = 128) -> int:
    """A key of `bits` bits from any parts, the same on every machine (blake2b, never `hash()`)."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=bits // 8).digest(), "little")


def torch_generator(*parts: int | str) -> torch.Generator:
    """A new CPU generator keyed by `parts`, for data noise and noise levels."""
    return torch.Generator().manual_seed(derive_key(*parts, bits=64) >> 1)


class _Generators(threading.local):
    """One Philox generator for each thread: a new key takes a fifth of the time of a new one."""

    def __init__(self) -> None:
        self._philox, self._zeros = np.random.Philox(key=0), np.zeros(4, dtype=np.uint64)
        # 4 is behind its end
        nothing_buffered = {"buffer": self._zeros, "buffer_pos": 4, "has_uint32": 0, "uinteger": 0}
        self._at_beginning: Any = {"bit_generator": "Philox", **nothing_buffered}

    def keyed(self, *parts: int | str) -> np.random.Philox:
        """The generator at the start of the stream `np.random.Philox(key=derive_key(*parts))`.

        The next call gives it another key.
        """
        key = np.frombuffer(derive_key(*parts).to_bytes(16, "little"), dtype="<u8")
        self._philox.state = self._at_beginning | {"state": {"counter": self._zeros, "key": key}}
        return self._philox


_generators = _Generators()


def bits_drawn(numel: int) -> int:
    """Return the number of bits that are drawn for `numel` elements: whole words of 64."""
    return -(-numel // 64) * 64


def packed_bits(numel: int, *parts: int | str) -> PackedBits:
    """Draw `numel` random bits: uint8 [8 · words] of Philox, the lowest bit of a word first."""
    words = _generators.keyed(*parts).random_raw(bits_drawn(numel) // 64)
    return np.ascontiguousarray(words, dtype="<u8").view(np.uint8)


@dataclass(frozen=True)
class Direction:
    """One random direction in the space of θ.

    Args:
        seed: of the run.
        step: counted from 0.
        index: of the direction within its step.
        distribution: "rademacher" or "gaussian"; a class with a `z` of its own has another name.
        patch_groups: how many z token-wise layers have, one for each patch group of an example
            (`core.grouped`).
    """

    seed: int
    step: int
    index: int = 0
    distribution: Distribution = "rademacher"
    patch_groups: int = 1

    def __init_subclass__(cls) -> None:
        if "z" in vars(cls) and cls.distribution == "rademacher":
            raise TypeError("`rademacher` is packed bits: give it a `distribution` of its own")

    def z(self, name: str, like: Tensor, each: bool = False) -> Tensor:
        """z for the tensor `name`: shape, dtype and device of `like`; mean 0, variance 1.

        With `each` there is one for each patch group, [patch groups, *shape].
        """
        if self.distribution == "rademacher":
            return self._choose(name, like, each, 1.0, -1.0)
        return self._gaussian(name, like, each)

    def exp_z(self, name: str, like: Tensor, radius: float, each: bool = False) -> Tensor:
        """exp(radius · z); for Rademacher z each element is one of two constants from float64."""
        if self.distribution == "rademacher":
            return self._choose(name, like, each, *exp_pair(radius))
        return torch.exp(radius * self.z(name, like, each))

    def packed(self, name: str, numel: int, each: bool = False) -> PackedBits:
        """The bits of `numel` Rademacher signs of the tensor `name`, eight a byte.

        With `each`, [patch groups, bytes of whole words].
        """
        bits = packed_bits(
            (self.patch_groups if each else 1) * bits_drawn(numel),
            self.seed,
            self.step,
            self.index,
            name,
        )
        return bits.reshape(self.patch_groups, -1) if each else bits

    def _choose(
        self, name: str, like: Tensor, each: bool, if_set: float, if_clear: float
    ) -> Tensor:
        packed = to_device(self.packed(name, like.numel(), each), like.device)
        chosen = select(packed, [(if_set, if_clear)], like.dtype, 0, like.numel())
        return chosen.view(self.patch_groups, *like.shape) if each else chosen.view(like.shape)

    def _gaussian(self, name: str, like: Tensor, each: bool) -> Tensor:
        generator = np.random.Generator(_generators.keyed(self.seed, self.step, self.index, name))
        values = generator.standard_normal(
            (self.patch_groups, *like.shape) if each else tuple(like.shape), dtype=np.float32
        )
        return torch.from_numpy(values).to(device=like.device, dtype=like.dtype)


def directions_of_step(
    seed: int, step: int, count: int, distribution: Distribution, patch_groups: int = 1
) -> tuple[Direction, ...]:
    """The first `count` directions of a step."""
    return tuple(Direction(seed, step, index, distribution, patch_groups) for index in range(count))
