"""Weights on a grid: INT8, INT4 (two a byte) or FP8 codes and fixed fp32 scales, for training the
codes themselves (`core.quzo`).

    w[o, k] = value(codes[o, k]) · scales[o] / high            int8 and fp8: a scale per output
    w[o, k] = codes[o, k] · scales[o, block of k] / 7          int4: a scale per block of columns

`scales` is the largest magnitude of its weights, as in other formats. Codes of int8 are -127 ..
127, of int4 -7 .. 7: the negative of a weight is one. Codes of fp8 count the finite numbers of e4m3
in their order, -126 .. 126, so a step of one goes to the next.

Activations are left as they are, or rounded to 8 or 4 bits with a scale for each token (W8A8, W4A8,
W4A4; products of 4 bits are simulated in floating point).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GridType = Literal["int4", "int8", "fp8"]
Activations = Literal["float", "int8", "int4"]
LARGEST_ACTIVATION = {"int8": 127, "int4": 7}
FEWEST_ROWS = 32  # of a product of int8 on a GPU, which refuses 16


class Int8Grid:
    """One code a byte, int8."""

    low, high, per_byte, largest = -127, 127, 1, 127.0
    dtype = torch.int8

    def codes(self, stored: Tensor) -> Tensor:
        return stored.float()

    def stored(self, codes: Tensor) -> Tensor:
        return codes.to(torch.int8)

    def values(self, codes: Tensor) -> Tensor:
        """Codes [..., K] -> what they stand for, in units of scale / largest."""
        return codes

    def places(self, values: Tensor) -> Tensor:
        """The inverse of `values`, linear between two neighbouring codes."""
        return values


class Int4Grid(Int8Grid):
    """Two codes a byte, the first in the high half, offset by 8."""

    low, high, per_byte, largest = -7, 7, 2, 7.0
    dtype = torch.uint8

    def codes(self, stored: Tensor) -> Tensor:
        # written in place: half the time of a stack that is then converted
        pairs = torch.empty(*stored.shape, 2, dtype=torch.float32, device=stored.device)
        pairs[..., 0], pairs[..., 1] = stored >> 4, stored & 15
        return pairs.flatten(-2).sub_(8)

    def stored(self, codes: Tensor) -> Tensor:
        pairs = codes.add(8).to(torch.uint8).unflatten(-1, (-1, 2))
        return (pairs[..., 0] << 4) | pairs[..., 1]


class Fp8Grid(Int8Grid):
    """Bytes of float8_e4m3fn: a sign and seven bits that count magnitudes; 127 would be NaN, and -0
    is stored as 0.
    """

    low, high, per_byte, largest = -126, 126, 1, 448.0
    dtype = torch.uint8

    def codes(self, stored: Tensor) -> Tensor:
        magnitude = (stored & 127).float()
        return torch.where(stored > 127, -magnitude, magnitude)

    def stored(self, codes: Tensor) -> Tensor:
        return torch.where(codes < 0, codes.abs() + 128, codes).to(torch.uint8)

    def values(self, codes: Tensor) -> Tensor:
        return from_fp8(self.stored(codes))

    def places(self, values: Tensor) -> Tensor:
        magnitude = values.abs().clamp(max=self.largest)
        nearest = self.codes(magnitude.to(torch.float8_e4m3fn).view(torch.uint8))
        below = nearest - (self.values(nearest) > magnitude).to(nearest.dtype)
        low, high = self.values(below), self.values((below + 1).clamp(max=self.high))
        part = (magnitude - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny)
        return below.add_(part).copysign_(values)


GRIDS: dict[str, Int8Grid] = {"int8": Int8Grid(), "int4": Int4Grid(), "fp8": Fp8Grid()}


def quantize(weight: Tensor, kind: GridType, blocksize: int) -> tuple[Tensor, Tensor]:
    """weight [N, K] -> codes as stored [N, K / per_byte], scales fp32 [N · K / blocksize] for int4,
    else [N]; nearest code.
    """
    grid, weight = GRIDS[kind], weight.detach().float()
    blocks = weight.reshape(-1, blocksize if kind == "int4" else weight.shape[1])
    scales = blocks.abs().amax(1)
    unit = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1) * grid.largest
    if kind == "fp8":
        codes = grid.codes(unit.to(torch.float8_e4m3fn).view(torch.uint8))
    else:
        codes = unit.round().clamp_(grid.low, grid.high)
    return grid.stored(codes.view(weight.shape)), scales


def columns_of_block(kind: GridType, blocksize: int) -> int:
    """Return the number that the number of inputs must be a multiple of."""
    return blocksize if kind == "int4" else 1


class IntGridLinear(nn.Module):
    """A linear layer over stored codes. Buffers: `codes`, and fp32 `scales` that nothing here
    changes.
    """

    codes: Tensor
    scales: Tensor

    def __init__(
        self,
        codes: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        kind: GridType,
        activations: Activations,
    ) -> None:
        super().__init__()
        self.kind, self.grid, self.activations = kind, GRIDS[kind], activations
        self.out_features, self.in_features = codes.shape[0], codes.shape[1] * self.grid.per_byte
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        """`.to(dtype)` and `.half()` leave the scales in fp32."""
        super()._apply(fn, recurse)
        self.scales = self.scales.float()
        return self

    def whole_numbers(self) -> Tensor:
        """Return the unscaled numbers of the codes, [N, K], also for codes that are not whole."""
        if self.kind == "fp8":
            return from_fp8(self.codes)
        return self.codes if self.codes.is_floating_point() else self.grid.codes(self.codes)

    def dequantized(self) -> Tensor:
        """The weight [N, K], fp32."""
        blocks = self.whole_numbers().view(self.scales.numel(), -1) * (
            self.scales / self.grid.largest
        ).unsqueeze(1)
        return blocks.view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.activations != "float":
            return self._of_rounded(x, bias)
        if self.scales.numel() > self.out_features:
            return F.linear(x, self.dequantized().to(x.dtype), bias)
        # One scale an output: applied to what the product gives, the weight is never made.
        plain = self.kind == "int8" and not self.codes.is_floating_point()
        y = F.linear(x, (self.codes if plain else self.whole_numbers()).to(x.dtype))
        return self._scaled(y.float(), self.scales / self.grid.largest, bias, x.dtype)

    def _of_rounded(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Inputs rounded to 8 or 4 bits, a scale for each token.

        For int8 codes the product is of integers, exact; for others it is in the dtype of x, which
        holds rounded inputs exactly.
        """
        flat = x.reshape(-1, self.in_features).float()
        unit = (
            flat.abs().amax(1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
            / LARGEST_ACTIVATION[self.activations]
        )
        rounded = (flat / unit).round_()
        if self.codes.dtype == torch.int8:
            product = int8_product(rounded.to(torch.int8), self.codes).float()
            y = product * unit * (self.scales / self.grid.largest)
        else:
            y = F.linear(rounded.to(x.dtype), self.dequantized().to(x.dtype)).float() * unit
        return self._scaled(y.view(*x.shape[:-1], self.out_features), None, bias, x.dtype)

    @staticmethod
    def _scaled(
        y: Tensor, factor: Tensor | None, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        y = y if factor is None else y.mul_(factor)
        return (y if bias is None else y.add_(bias.float())).to(dtype)


def from_fp8(codes: Tensor) -> Tensor:
    """Bytes of e4m3 -> fp32, exact; no NaN among them.

    On a CPU their bits are moved to the places that float16 has for them, whose exponent counts
    from 8 less: torch's own conversion takes as long as the product of the layer.
    """
    if codes.device.type != "cpu":
        return codes.view(torch.float8_e4m3fn).to(torch.float32)
    halves = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7)
    halves.bitwise_and_(~(1 << 14))  # the sign was extended into the exponent
    return halves.view(torch.float16).float().mul_(2**8)


def int8_product(x: Tensor, codes: Tensor) -> Tensor:
    """x codesᵀ, exact: int8 [R, K] and [N, K] -> int32 [R, N].

    On a GPU `torch._int_mm` wants more than 16 rows and multiples of 8 elsewhere: zeros fill up.
    """
    if not x.numel() or not codes.numel():
        return x.new_zeros(len(x), len(codes), dtype=torch.int32)
    if x.device.type != "cuda":
        return torch._int_mm(x, codes.t())
    return _filled_up_product(x, codes)


def _filled_up_product(x: Tensor, codes: Tensor) -> Tensor:
    columns, outputs = -x.shape[1] % 8, -len(codes) % 8
    wide = F.pad(x, (0, columns, 0, max(0, FEWEST_ROWS - len(x))))
    wide_codes = F.pad(codes, (0, columns, 0, outputs)) if columns or outputs else codes
    return torch._int_mm(wide.contiguous(), wide_codes.t())[: len(x), : len(codes)]


def quantize_linear(
    linear: nn.Linear, kind: GridType, blocksize: int, activations: Activations
) -> IntGridLinear:
    return IntGridLinear(*quantize(linear.weight, kind, blocksize), linear.bias, kind, activations)


@dataclass(frozen=True)
class CodesHandle:
    """The codes are what may change: `core.scales` holds them in place of scales."""

    name: str
    module: IntGridLinear

    @property
    def scales(self) -> Tensor:
        return self.module.codes

    @property
    def grid(self) -> Int8Grid:
        return self.module.grid

    def override(self, scales: Tensor) -> None:
        self.module.codes = scales


def codes_handles(model: nn.Module) -> Iterator[CodesHandle]:
    for name, module in model.named_modules():
        if isinstance(module, IntGridLinear):
            yield CodesHandle(name, module)
