"""GGUF's blocks (llama.cpp), dequantized by diffusers' functions; what is trained is a factor of
each block, starting at |d|.

    w[o, b] = scales[o, b] / |d[o, b]| · block[o, b]

where d is the fp16 factor of a block. The block's minimum (in a "K" type the factor of its
minimums) changes by the same ratio, so w is linear in the scale. Both are stored times that ratio.

Traps that this file disarms, each held by a test:
* d may be negative. It is zero where a whole block is zero.
* fp16 factors lose most updates. The live scales are fp32; only their rounding goes to disk.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qzo_diffusion.core.errors import ModelError

# Where in a block its fp16 factors are, in bytes: d first.
FACTORS = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}
EVERY = slice(None)
AT_ONCE = 2**20  # weights that are dequantized at once on a CPU
Rounding = Callable[[Tensor, Tensor], Tensor]


def need_package() -> Any:
    """The package gguf. Raises ModelError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise ModelError(
            "a GGUF file, and no package to read it", "gguf", 'pip install "qzo-diffusion[gguf]"'
        ) from None
    return gguf


class GgufLinear(nn.Module):
    """A linear over GGUF's blocks.

    Buffers: `codes` uint8 [N, bytes of a row] as stored, `scales` fp32 [N, blocks of a row].

    Args:
        kind: name of the type. rows: int64 [N], which row of the file each output is; None where
            they are in its order.

    Raises:
        ModelError: a factor that is not finite.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, codes: Tensor, kind: str, rows: Tensor | None, bias: Tensor | None) -> None:
        super().__init__()
        package = need_package()
        self.kind, self.rows = kind, rows
        self._size, self._bytes = package.GGML_QUANT_SIZES[package.GGMLQuantizationType[kind]]
        self.out_features, self.in_features = (
            codes.shape[0],
            codes.shape[1] // self._bytes * self._size,
        )
        self.register_buffer("codes", codes)
        if not all(self.factor(place).isfinite().all() for place in FACTORS[kind]):
            raise ModelError(
                "blocks of GGUF with a factor that is not finite",
                "finite weights",
                "download the file again",
            )
        self.register_buffer("scales", self.stored_scales())
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def _blocks(self) -> Tensor:
        return self.codes.view(self.out_features, -1, self._bytes)

    def factor(self, place: int, rows: slice = EVERY) -> Tensor:
        """The number at a place of each block as stored, fp16 [N, blocks]."""
        pair = self._blocks()[rows, :, place : place + 2]
        return pair.contiguous().view(torch.float16).squeeze(-1)

    def stored_scales(self, rows: slice = EVERY) -> Tensor:
        """|d| of each block as stored, fp32 [N, blocks]."""
        return self.factor(FACTORS[self.kind][0], rows).float().abs()

    def gains(self, scales: Tensor, rows: slice = EVERY) -> Tensor:
        """Each block's scale over the stored one, [N, blocks]; 1 for a block of zeros."""
        stored = self.stored_scales(rows)
        return torch.where(stored == 0, 1.0, scales[rows] / stored)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K], computed in fp32. Beside it there are temporary tensors for some rows only."""
        at_once = AT_ONCE if self.codes.device.type == "cpu" else 16 * AT_ONCE
        count = max(1, at_once // self.in_features)
        parts = [slice(start, start + count) for start in range(0, self.out_features, count)]
        if self.scales.requires_grad:  # of which no part may be overwritten
            return torch.cat([self._part(rows) for rows in parts]).to(dtype)
        weight = self.codes.new_empty((self.out_features, self.in_features), dtype=dtype)
        for rows in parts:
            weight[rows] = self._part(rows)
        return weight

    def _part(self, rows: slice) -> Tensor:
        found = dequantized(self.codes[rows], self.kind)
        by_block = found.view(len(found), -1, self._size)
        return (by_block * self.gains(self.scales, rows).unsqueeze(-1)).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantized(x.dtype), self.bias)

    def bytes_to_store(self, scales: Tensor, rounding: Rounding | None = None) -> Tensor:
        """uint8 [N, bytes of a row] in the order of the file, with factors for these scales.

        Args:
            rounding: (factors fp32, gains fp32), both [N, blocks] -> fp16; by default to the
                nearest number.

        Raises:
            ModelError: a factor beyond the range of fp16.
        """
        blocks, gains = self._blocks().clone(), self.gains(scales)
        for place in FACTORS[self.kind]:
            new = (rounding or to_nearest)(self.factor(place).float(), gains)
            if not bool(new.isfinite().all()):
                raise ModelError(
                    "tuned scales beyond the range of GGUF's 16-bit numbers",
                    "scales near those of the file",
                    "export an earlier checkpoint",
                )
            blocks[..., place : place + 2] = new.unsqueeze(-1).view(torch.uint8)
        if self.rows is None:
            return blocks.flatten(1)
        stored = torch.empty_like(self.codes)
        stored[self.rows] = blocks.flatten(1)
        return stored


def to_nearest(factors: Tensor, gains: Tensor) -> Tensor:
    """factors · gains, rounded to fp16."""
    return (factors * gains).half()


def dequantized(codes: Tensor, kind: str) -> Tensor:
    """Bytes uint8 [N, bytes of a row] -> the numbers that they are in the file, fp32 [N, K]."""
    package = need_package()
    size, count = package.GGML_QUANT_SIZES[package.GGMLQuantizationType[kind]]
    return _dequantizer(kind)(codes.reshape(-1, count), size, count, torch.float32).view(
        len(codes), -1
    )


def _dequantizer(kind: str) -> Callable[[Tensor, int, int, torch.dtype], Tensor]:
    from diffusers.quantizers.gguf.utils import dequantize_functions

    found: Callable[[Tensor, int, int, torch.dtype], Tensor] = dequantize_functions[
        need_package().GGMLQuantizationType[kind]
    ]
    return found
