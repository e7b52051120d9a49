"""bitsandbytes `Linear4bit` (NF4 and FP4, any block size, double quantization un-nested), on CPU and CUDA.

Traps that this file disarms, each held by a test:
* In eval mode on a CPU with AVX512-BF16 the layer repacks itself on the first forward: `absmax` becomes a transposed bfloat16
  tensor, perturbations below 0.4 % vanish, and saving afterwards corrupts the checkpoint. `support_avx512bf16_for_cpu = False`
  keeps the plain layout, which is also faster for the shapes of diffusion.
* With double quantization `absmax` is uint8 codes of scales; it is decoded to fp32 once.
* Rows that are not whole blocks are dequantized wrongly on the CPU: refused.
* The forward reads `weight.quant_state`, which after a deepcopy is another object than `module.quant_state`: always go through
  the weight.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.quant.base import QuantType


def _bitsandbytes() -> Any:
    import bitsandbytes  # on first use: half a second, and not needed by the reference back-end

    return bitsandbytes


def quantize_linear(
    linear: nn.Linear, quant_type: QuantType, blocksize: int, device: torch.device, double_quant: bool = False
) -> nn.Module:
    """A `Linear4bit` with the weights of `linear`, quantized on `device`, ready for tuning."""
    bnb = _bitsandbytes()
    weight, bias = linear.weight.detach(), linear.bias
    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=weight.dtype,
        compress_statistics=double_quant,
        quant_type=quant_type,
        device="meta",
    )
    layer.weight = bnb.nn.Params4bit(
        weight.contiguous(),
        requires_grad=False,
        blocksize=blocksize,
        compress_statistics=double_quant,
        quant_type=quant_type,
        module=layer,
    ).to(device)
    layer.bias = None if bias is None else nn.Parameter(bias.detach().to(device), requires_grad=False)
    prepare_(layer, "linear")
    return layer


def prepare_(module: Any, name: str) -> None:
    """Make a `Linear4bit` safe for tuning: never repacked, scales fp32 and not nested.

    Raises:
        ModelError: the layer is not on a device, not quantized yet, already repacked, or has rows that are not whole blocks.
    """
    state = getattr(module.weight, "quant_state", None)
    if module.weight.is_meta:
        raise ModelError(f"{name} is on the meta device", "weights in memory", "load without CPU or disk offload")
    if state is None:
        raise ModelError(f"{name} is not quantized yet", "a quantized Linear4bit", "move the model to its device first")
    if getattr(state, "packing_format_for_cpu", False):
        raise ModelError(
            f"{name} was repacked by a forward pass; its scales are rounded to bfloat16",
            "a layer in the plain 4-bit layout",
            "load the model again and prepare it before the first forward",
        )
    if module.weight.device.type == "cpu" and module.in_features % state.blocksize:
        raise ModelError(
            f"{name} has {module.in_features} inputs in blocks of {state.blocksize}",
            "rows of whole blocks (bitsandbytes dequantizes others wrongly on the CPU)",
            f"add {name!r} to quant.skip or choose another quant.blocksize",
        )
    module.support_avx512bf16_for_cpu = False
    if state.nested:
        functional = _bitsandbytes().functional
        state.absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        state.nested, state.state2, state.offset = False, None, None
    state.absmax = state.absmax.float()


@dataclass(frozen=True)
class BnbHandle:
    name: str
    module: Any

    @property
    def scales(self) -> Tensor:
        return self.module.weight.quant_state.absmax

    @property
    def codes(self) -> Tensor:
        """uint8, two codes a byte, the first in the high half."""
        return self.module.weight.data

    def dequantized(self) -> Tensor:
        """The weight [N, K] at the scales that are shown, in the layer's compute dtype."""
        return _bitsandbytes().functional.dequantize_4bit(self.module.weight.data, self.module.weight.quant_state)

    def show(self, scales: Tensor) -> None:
        self.module.weight.quant_state.absmax = scales
