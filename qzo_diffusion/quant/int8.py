"""bitsandbytes `Linear8bitLt` (LLM.int8): int8 codes and one fp32 scale per output.

    w[o, k] = codes[o, k] · SCB[o] / 127

In eval mode the layer also rounds its inputs to int8. That hides small changes of a scale: a
derivative of -0.0098 was measured as -0.0143 and -0.0045. The layer's training path leaves inputs
as they are; a hook chooses it before every forward, also after `eval()`. That path was not run on
a GPU here."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qzo_diffusion.core.errors import ModelError

LARGEST = 127


def quantize_linear(linear: nn.Linear, device: torch.device) -> nn.Module:
    """A `Linear8bitLt` with the weights of `linear`, quantized on `device`, ready for tuning."""
    import bitsandbytes as bnb

    layer: Any = bnb.nn.Linear8bitLt(
        linear.in_features, linear.out_features, bias=False, has_fp16_weights=False, device="meta"
    )
    layer.weight = bnb.nn.Int8Params(
        linear.weight.detach(), has_fp16_weights=False, requires_grad=False
    ).to(device)
    layer.bias = (
        None
        if linear.bias is None
        else nn.Parameter(linear.bias.detach().to(device), requires_grad=False)
    )
    prepare_(layer, "linear")
    return layer


def prepare_(module: Any, name: str) -> None:
    """Make a `Linear8bitLt` safe for tuning: the forward reads live scales and rounds no input.

    Raises:
        ModelError: the layer is not quantized yet, not in memory, or splits its inputs at a
            threshold.
    """
    if module.weight.is_meta:
        raise ModelError(
            f"{name} is on the meta device", "weights in memory", "load without CPU or disk offload"
        )
    if module.weight.CB is not None:
        module.init_8bit_state()
    if module.state.has_fp16_weights or module.state.SCB is None:
        raise ModelError(
            f"{name} is not quantized yet",
            "a quantized Linear8bitLt",
            "move the model to its device first",
        )
    module.state.SCB = module.state.SCB.float()
    if _exact not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_exact)


def _exact(module: nn.Module, _args: Any) -> None:
    module.training = True


@dataclass(frozen=True)
class Int8Handle:
    name: str
    module: Any

    @property
    def scales(self) -> Tensor:
        return self.module.state.SCB

    @property
    def codes(self) -> Tensor:
        """int8 [N, K]."""
        return self.module.state.CB

    def dequantized(self) -> Tensor:
        """The weight [N, K], fp32, at the scales that are shown."""
        return self.module.state.CB.float() * (self.module.state.SCB / LARGEST).unsqueeze(1)

    def override(self, scales: Tensor) -> None:
        self.module.state.SCB = scales
