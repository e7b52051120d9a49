"""HQQ's format (Badri and Shaji 2023) of 8, 4, 2 or 1 bits, read and dequantized here, from folders
that transformers 4 saved.

    w[o, g] = scales[o, g] · (q[o, g] - zeros[o, g])        g a run of inputs, as GPTQ's groups,
                                                            but zeros are no whole numbers

    W_q    uint8 [N · K / group · bits / 8, group]    the first part of all groups
                                                  in the highest bits, the last in the lowest
    scale, zero    fp16, bf16 or fp32 [N · K / group, 1]
    axis, shape, packing, view_as_float    settings, as tensors; text as its characters' numbers

Traps that this file disarms, each held by a test:
* Scales of 16 bits lose most updates. The live scales are fp32; only their rounding goes to disk.
* The package computes weights in the dtype of its scales: in bfloat16 with three digits. Here they
  are computed in fp32.
* Scales of groups along outputs (`axis` 0) belong to no row. Such layers are refused.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qzo_diffusion.core.errors import ModelError

PARTS = ("W_q", "scale", "zero", "axis", "shape", "packing", "view_as_float")
# Beside a layer, of no meaning for its weight; `quant_scale` and `quant_zero` where they are zero.
DESCRIPTION = {
    *("nbits", "group_size", "compute_dtype", "unpack_view_dtype", "channel_wise", "optimize"),
    *("round_zero", "offload_meta", "encoded_state_dict", "stores_quant_config"),
}
FLAGS = {"quant_scale", "quant_zero"}
STORED = "scale"  # the part that is trained
BITS = {"8bit_u8": 8, "4bit_u8": 4, "2bit_u8": 2, "1bit_u8": 1}


def unpack(packed: Tensor, bits: int) -> Tensor:
    """uint8 [rows, group] -> uint8 [rows · 8 / bits, group]."""
    return torch.cat([packed >> shift & (2**bits - 1) for shift in range(8 - bits, -1, -bits)])


class HqqLinear(nn.Module):
    """A linear over HQQ's codes. Buffers: `codes` uint8 as stored, `zeros` and `scales` fp32 [N, K
    / group].
    """

    codes: Tensor
    zeros: Tensor
    scales: Tensor

    def __init__(
        self, codes: Tensor, bits: int, zeros: Tensor, scales: Tensor, bias: Tensor | None
    ) -> None:
        super().__init__()
        self.bits = bits
        self.out_features, self.in_features = scales.shape[0], scales.shape[1] * codes.shape[1]
        self.register_buffer("codes", codes)
        self.register_buffer("zeros", zeros)
        self.register_buffer("scales", scales)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def dequantized(self) -> Tensor:
        """[N, K] in the dtype of the scales."""
        steps = unpack(self.codes, self.bits).to(self.scales.dtype).view(
            *self.scales.shape, -1
        ) - self.zeros.unsqueeze(-1)
        return (steps * self.scales.unsqueeze(-1)).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantized().to(x.dtype), self.bias)


def layer_from_state(name: str, state: Mapping[str, Tensor], bias: Tensor | None) -> HqqLinear:
    """The layer of what `PARTS` are stored of it.

    Raises ModelError when they are missing, don't fit together or are not read.
    """
    try:
        packing = "".join(map(chr, state["packing"].tolist()))
        if packing not in BITS or state["axis"].item() != 1:
            raise ValueError(f"packing {packing}, axis {state['axis'].item()}")
        codes = state["W_q"].view(torch.uint8) if state["view_as_float"].item() else state["W_q"]
        outputs, inputs = state["shape"].tolist()
        groups, packed, size = len(state["scale"]), len(codes), codes.shape[1]
        if (
            groups * size != outputs * inputs
            or packed * 8 != groups * BITS[packing]
            or state["zero"].shape != (groups, 1)
        ):
            raise ValueError(
                f"W_q {tuple(codes.shape)}, scale {tuple(state['scale'].shape)} for {outputs} x "
                f"{inputs}"
            )
        if inputs % size:
            raise ValueError(f"groups of {size} that cross rows of {inputs}")
    except (KeyError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{name} is no HQQ layer that is read: {error}",
            f"axis=1 and {', '.join(map(str, BITS.values()))} bits, in groups of inputs",
            "quantize the model so, or give the model it was made of",
        ) from None
    zeros, live = (state[part].float().reshape(outputs, -1) for part in ("zero", "scale"))
    return HqqLinear(codes, BITS[packing], zeros, live, bias)


def scales_to_store(scales: Tensor) -> Tensor:
    """[N, K / group] fp32 -> [N · K / group, 1] as files have them."""
    return scales.reshape(-1, 1)
