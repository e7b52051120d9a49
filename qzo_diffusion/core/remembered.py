"""What an optimizer remembers of each trained tensor: as it is, or packed in a few bits a number.

`core.low_bit_maps` has the maps. A tensor is cut into blocks of 128 numbers, the last of which may
be shorter. A tensor with fewer numbers than a block stays in fp32: it is small, and often one
number for a whole layer. Random numbers for rounding are drawn from the step's seed, the count of
steps and the tensor's name, as directions are (`core.noise`), so that a run resumes and replays
bit for bit."""

from collections.abc import Mapping
from typing import Literal, Protocol

import torch
from torch import Tensor

from qzo_diffusion.core.low_bit_maps import DynamicMap, LogarithmicMap, pack, unpack

Bits = Literal[32, 8, 4, 3, 2]
BLOCK = 128


class Remembered(Protocol):
    """One kind of tensor, such as all first moments, by the names of the trained tensors."""

    def read(self, name: str, like: Tensor) -> Tensor | None:
        """The tensor, with the shape of `like` where it is packed; None before the first `write`.
        The caller may change it before it writes it back.
        """
        ...

    def write(self, name: str, value: Tensor, *key: int) -> None:
        """Keep the tensor. Random numbers that round it follow from the seed and count of steps."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Live tensors, not copies."""
        ...

    def load_(self, state: Mapping[str, Tensor]) -> None:
        """Take what is its own from an optimizer's state. Raises ValueError where that has other
        bits.
        """
        ...


class Exact:
    """Tensors as they are."""

    def __init__(self, label: str) -> None:
        self._prefix = f"{label}."
        self._kept: dict[str, Tensor] = {}

    def read(self, name: str, like: Tensor) -> Tensor | None:
        return self._kept.get(name)

    def write(self, name: str, value: Tensor, *key: int) -> None:
        self._kept[name] = value

    def state(self) -> dict[str, Tensor]:
        return {self._prefix + name: tensor for name, tensor in self._kept.items()}

    def load_(self, state: Mapping[str, Tensor]) -> None:
        self._kept = _own(state, self._prefix)
        if any(tensor.dtype == torch.uint8 for tensor in self._kept.values()):
            raise ValueError("its optimizer's state has few bits a number, not 32")


class InFewBits:
    """Codes, packed, and a few figures for each block.

    Args:
        label: begins the names in a state.
        form: the map.
    """

    def __init__(self, label: str, form: DynamicMap | LogarithmicMap) -> None:
        self._label, self._form = label, form
        self._codes: dict[str, Tensor] = {}
        self._figures: dict[str, Tensor] = {}
        self._short = Exact(label)

    def read(self, name: str, like: Tensor) -> Tensor | None:
        if name not in self._codes:
            return self._short.read(name, like)
        figures, count = self._figures[name], like.numel()
        codes = unpack(self._codes[name], self._form.bits, count)
        missing = len(figures) * BLOCK - count
        blocks = torch.nn.functional.pad(codes, (0, missing)).view(-1, BLOCK)
        return self._form.decode(blocks, figures).flatten()[:count].view_as(like).to(like.dtype)

    def write(self, name: str, value: Tensor, *key: int) -> None:
        if value.numel() < BLOCK:
            self._short.write(name, value)
            return
        flat = value.float().flatten()
        rest = flat[-1:].expand(-len(flat) % BLOCK)  # zeros would be the quantile of a short block
        blocks = torch.cat([flat, rest]).view(-1, BLOCK)
        codes, self._figures[name] = self._form.encode(blocks, *key, self._label, name)
        self._codes[name] = pack(codes.flatten()[: len(flat)].contiguous(), self._form.bits)

    def state(self) -> dict[str, Tensor]:
        codes = {f"{self._label}.{name}": tensor for name, tensor in self._codes.items()}
        figures = {f"{self._label}_blocks.{name}": one for name, one in self._figures.items()}
        return self._short.state() | codes | figures

    def load_(self, state: Mapping[str, Tensor]) -> None:
        own = _own(state, f"{self._label}.")
        self._codes = {name: tensor for name, tensor in own.items() if tensor.dtype == torch.uint8}
        self._figures = _own(state, f"{self._label}_blocks.")
        self._short.load_({f"{self._label}.{name}": own[name] for name in own.keys() - self._codes})
        if self._codes.keys() != self._figures.keys() or not all(map(self._fits, self._codes)):
            raise ValueError(f"its optimizer's state has not {self._form.bits} bits a number")

    def _fits(self, name: str) -> bool:
        blocks, figures = self._figures[name].shape
        most = blocks * BLOCK * self._form.bits // 8
        least = most - BLOCK * self._form.bits // 8
        return figures == self._form.figures and least < self._codes[name].numel() <= most


def _own(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Copies of the tensors whose names begin so, without that beginning."""
    return {
        name.removeprefix(prefix): tensor.clone()
        for name, tensor in state.items()
        if name.startswith(prefix)
    }


def first_moment(label: str, bits: Bits) -> Remembered:
    """Averages of gradients, of either sign: the dynamic map."""
    return Exact(label) if bits == 32 else InFewBits(label, DynamicMap(bits, signed=True))


def second_moment(label: str, bits: Bits) -> Remembered:
    """Averages of squares: the dynamic map in 8 bits, below that the logarithmic one, which draws
    random numbers.
    """
    if bits == 32:
        return Exact(label)
    if bits == 8:
        return InFewBits(label, DynamicMap(bits, signed=False))
    return InFewBits(label, LogarithmicMap(bits))
