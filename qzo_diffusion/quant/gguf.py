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
        kind: name of the type. rows: int64 [N], which row of the file each output is.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, codes: Tensor, kind: str, rows: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        package = need_package()
        self.kind, self.rows = kind, rows
        self._size, self._bytes = package.GGML_QUANT_SIZES[package.GGMLQuantizationType[kind]]
        self.out_features, self.in_features = (
            codes.shape[0],
            codes.shape[1] // self._bytes * self._size,
        )
        self.register_buffer("codes", codes)
        self.register_buffer("scales", self._stored_d())
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def _blocks(self) -> Tensor:
        return self.codes.view(self.out_features, -1, self._bytes)

    def _stored_d(self) -> Tensor:
        """|d| of each block."""
        first = FACTORS[self.kind][0]
        return (
            self._blocks()[..., first : first + 2]
            .contiguous()
            .view(torch.float16)
            .squeeze(-1)
            .float()
            .abs()
        )

    def _ratio(self, scales: Tensor) -> Tensor:
        """Each block's scale over the stored one, [N, blocks, 1]; 1 for a block of zeros."""
        stored = self._stored_d()
        return torch.where(stored == 0, 1.0, scales / stored).unsqueeze(-1)

    def dequantized(self) -> Tensor:
        """[N, K] fp32."""
        weight = _dequantizer(self.kind)(
            self._blocks().flatten(0, 1), self._size, self._bytes, torch.float32
        )
        return (weight.view(*self.scales.shape, -1) * self._ratio(self.scales)).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantized().to(x.dtype), self.bias)

    def bytes_to_store(self, scales: Tensor) -> Tensor:
        """uint8 [N, bytes of a row] in the order of the file, with factors for these scales,
        rounded to fp16.
        """
        blocks, gained = self._blocks().clone(), self._ratio(scales)
        for place in FACTORS[self.kind]:
            old = blocks[..., place : place + 2].contiguous().view(torch.float16)
            new = (old.float() * gained).half()
            if not bool(new.isfinite().all()):
                raise ModelError(
                    "tuned scales beyond the range of GGUF's 16-bit numbers",
                    "scales near those of the file",
                    "export an earlier checkpoint",
                )
            blocks[..., place : place + 2] = new.view(torch.uint8)
        stored = torch.empty_like(self.codes)
        stored[self.rows] = blocks.flatten(1)
        return stored


def _dequantizer(kind: str) -> Callable[[Tensor, int, int, torch.dtype], Tensor]:
    from diffusers.quantizers.gguf.utils import dequantize_functions

    found: Callable[[Tensor, int, int, torch.dtype], Tensor] = dequantize_functions[
        need_package().GGMLQuantizationType[kind]
    ]
    return found
