"""Blockwise 4-bit quantization in plain torch. The fast back-ends are tested against it.

    w[o, k] = codebook[codes[o, k]] · absmax[block of (o, k)]
    block b covers flat weights b·blocksize .. (b+1)·blocksize - 1

It is differentiable in `absmax` and works in float64, so tests take exact gradients from it. NF4
is the codebook of QLoRA (arXiv 2305.14314, appendix E): quantiles of a normal distribution. FP4 is
1 sign, 2 exponent and 1 mantissa bit, scaled to 1. The codebooks of BOF4 and BOF4-S are computed
(`quant.bof4`); the scales of BOF4-S have signs."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qzo_diffusion.quant import bof4
from qzo_diffusion.quant.base import CodebookType

# fmt: off
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on
# in the order of the bit patterns
_FP4_POSITIVE = (0.0, 0.0625 / 12, 8 / 12, 12 / 12, 4 / 12, 6 / 12, 2 / 12, 3 / 12)
CODEBOOKS: dict[str, tuple[float, ...]] = {
    "nf4": _NF4,
    "fp4": (*_FP4_POSITIVE, *(-value for value in _FP4_POSITIVE)),
}


def codebook(quant_type: CodebookType, blocksize: int) -> tuple[float, ...]:
    """The 16 numbers that codes stand for."""
    if quant_type in CODEBOOKS:
        return CODEBOOKS[quant_type]
    return bof4.codebook(blocksize, signed=quant_type == "bof4s")


def quantize_blockwise(
    weight: Tensor, quant_type: CodebookType, blocksize: int
) -> tuple[Tensor, Tensor]:
    """weight [N, K] -> codes uint8 [N, K], absmax [N·K / blocksize] in the weight's dtype (at least
    fp32).

    Each block is divided by its largest magnitude, in bof4s by its value of largest magnitude.
    Every number goes to the nearest entry of the codebook."""
    blocks = weight.detach().reshape(-1, blocksize)
    blocks = blocks.to(torch.promote_types(blocks.dtype, torch.float32))
    absmax = blocks.abs().amax(dim=1)
    divisor = absmax.clamp(min=torch.finfo(absmax.dtype).tiny)
    if quant_type == "bof4s":
        absmax = blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True)).squeeze(1)
        divisor = torch.where(absmax < 0, -divisor, divisor)
    unit = blocks / divisor.unsqueeze(1)
    values, order = unit.new_tensor(codebook(quant_type, blocksize)).sort()
    nearest = torch.bucketize(unit, (values[1:] + values[:-1]) / 2)
    return order[nearest].to(torch.uint8).view(weight.shape), absmax


def dequantize_blockwise(
    codes: Tensor, absmax: Tensor, quant_type: CodebookType, blocksize: int
) -> Tensor:
    """codes [N, K] and absmax [N·K / blocksize] -> weight [N, K] in absmax' dtype."""
    values = absmax.new_tensor(codebook(quant_type, blocksize))
    blocks = values[codes.long()].view(-1, blocksize) * absmax.unsqueeze(1)
    return blocks.view(codes.shape)


class ReferenceLinear4bit(nn.Module):
    """A linear layer over 4-bit codes. Buffers: `codes` uint8 [N, K], `absmax` fp32 or fp64 [N·K /
    blocksize].
    """

    codes: Tensor
    absmax: Tensor

    def __init__(
        self,
        codes: Tensor,
        absmax: Tensor,
        bias: Tensor | None,
        quant_type: CodebookType,
        blocksize: int,
    ) -> None:
        super().__init__()
        self.quant_type, self.blocksize = quant_type, blocksize
        self.out_features, self.in_features = codes.shape
        self.register_buffer("codes", codes)
        self.register_buffer("absmax", absmax)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, quant_type: CodebookType, blocksize: int
    ) -> "ReferenceLinear4bit":
        codes, absmax = quantize_blockwise(linear.weight, quant_type, blocksize)
        return cls(codes, absmax, linear.bias, quant_type, blocksize)

    @classmethod
    def from_packed(
        cls,
        packed: Tensor,
        absmax: Tensor,
        shape: tuple[int, ...],
        quant_type: CodebookType,
        blocksize: int,
        bias: Tensor | None,
    ) -> "ReferenceLinear4bit":
        """Make a layer from bitsandbytes' layout: two codes a byte, the first in the high half."""
        flat = packed.reshape(-1)
        return cls(
            torch.stack([flat >> 4, flat & 15], 1).view(shape), absmax, bias, quant_type, blocksize
        )

    @property
    def weight(self) -> Tensor:
        """The codes as int8, as other programs ask a quantized layer for its weight."""
        return self.codes.view(torch.int8)

    def forward(self, x: Tensor) -> Tensor:
        weight = dequantize_blockwise(self.codes, self.absmax, self.quant_type, self.blocksize)
        return F.linear(x, weight.to(x.dtype), self.bias)


@dataclass(frozen=True)
class ReferenceHandle:
    name: str
    module: ReferenceLinear4bit

    @property
    def scales(self) -> Tensor:
        return self.module.absmax

    @property
    def codes(self) -> Tensor:
        return self.module.codes

    def dequantized(self) -> Tensor:
        """The weight [N, K] at the scales that are shown."""
        return dequantize_blockwise(
            self.module.codes, self.module.absmax, self.module.quant_type, self.module.blocksize
        )

    def override(self, scales: Tensor) -> None:
        self.module.absmax = scales
