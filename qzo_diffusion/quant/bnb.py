"""bitsandbytes `Linear4bit` (NF4 and FP4, any block size, double quantization un-nested), on CPU
and CUDA.

Traps that this file disarms, each held by a test:
* In eval mode on a CPU with AVX512-BF16 the layer repacks itself on the first forward: `absmax`
  becomes a transposed bfloat16 tensor, perturbations below 0.4 % vanish, and saving afterwards
  corrupts the checkpoint. `support_avx512bf16_for_cpu = False` keeps the plain layout, which is
  also faster for the shapes of diffusion.
* With double quantization `absmax` holds uint8 codes of scales. It is decoded to fp32 once.
* The CPU kernel dequantizes rows that are not whole blocks wrongly. They are refused.
* The forward reads `weight.quant_state`. After a deepcopy this is another object than
  `module.quant_state`. Only the weight's is used here.
"""

from collections.abc import Container, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.quant.base import QuantType
from qzo_diffusion.quant.entries import empty_pages

T = TypeVar("T")
QUANTIZED_AT_ONCE = 2**17  # weights; small, so that what passes leaves small holes among what stays
_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")


def _bitsandbytes() -> Any:
    try:
        # on first use: half a second, and not needed by the reference back-end
        import bitsandbytes
    except ImportError as error:
        raise ModelError(
            f"bitsandbytes can't be imported: {error}",
            "its layers, which the model or the run has",
            "pip install bitsandbytes; a new run without it takes quant.backend=reference",
        ) from None
    return bitsandbytes


def quantization_config(model: nn.Module, quant_type: str, dtype: str) -> dict[str, Any]:
    """The entry `quantization_config` of a config.json, from which diffusers and transformers load
    a model of 4-bit layers.

    Args:
        model: its linear layers with weights in floating point are named as not quantized.
        dtype: that its products are computed in, such as "bfloat16".
    """
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module.weight.is_floating_point()
        ],
    }


def quantize_linear(
    linear: nn.Linear,
    quant_type: QuantType,
    blocksize: int,
    device: torch.device,
    double_quant: bool = False,
) -> nn.Module:
    """A `Linear4bit` with the weights of `linear`, quantized on `device`, ready for tuning."""
    bias = (
        None
        if linear.bias is None
        else nn.Parameter(linear.bias.detach().to(device), requires_grad=False)
    )
    return quantized_layer(
        linear.weight.detach().to(device), bias, quant_type, blocksize, double_quant
    )


def quantized_layer(
    weight: Tensor,
    bias: nn.Parameter | None,
    quant_type: QuantType,
    blocksize: int,
    double_quant: bool = False,
) -> nn.Module:
    """A `Linear4bit` for weight [N, K], on its device; products are in its dtype."""
    functional = _bitsandbytes().functional
    packed, absmax = _quantized_in_parts(weight, quant_type, blocksize)
    offset, nested = None, None
    if double_quant:
        offset = absmax.mean()
        absmax, nested = functional.quantize_blockwise(absmax - offset, blocksize=256)
    state = functional.QuantState(
        absmax=absmax,
        shape=weight.shape,
        code=functional.get_4bit_type(quant_type, device=weight.device),
        blocksize=blocksize,
        quant_type=quant_type,
        dtype=weight.dtype,
        offset=offset,
        state2=nested,
    )
    return _layer(packed, state, bias, "linear")


def _quantized_in_parts(
    weight: Tensor, quant_type: QuantType, blocksize: int
) -> tuple[Tensor, Tensor]:
    """Packed codes uint8 [N·K / 2, 1] and absmax fp32 [N·K / blocksize], the same bits as in one
    call.

    On the CPU bitsandbytes makes six tensors of the weight's size in fp32 on the way, 800 MB for
    the largest layer of SD3.5 Large."""
    functional = _bitsandbytes().functional
    rows, columns = weight.shape
    at_once = (
        max(1, QUANTIZED_AT_ONCE // columns)
        if weight.device.type == "cpu" and columns % blocksize == 0
        else rows
    )
    if at_once >= rows:
        packed, state = functional.quantize_4bit(
            weight.contiguous(), blocksize=blocksize, quant_type=quant_type
        )
        return packed, state.absmax
    packed = empty_pages((weight.numel() // 2, 1), torch.uint8)
    absmax = empty_pages((weight.numel() // blocksize,), torch.float32)
    for start in range(0, rows, at_once):
        part = weight[start : start + at_once].contiguous()
        codes, state = functional.quantize_4bit(part, blocksize=blocksize, quant_type=quant_type)
        first = start * columns
        packed[first // 2 : first // 2 + len(codes)] = codes
        absmax[first // blocksize : first // blocksize + len(state.absmax)] = state.absmax
    return packed, absmax


def _layer(packed: Tensor, state: Any, bias: nn.Parameter | None, name: str) -> nn.Module:
    bnb = _bitsandbytes()
    outputs, inputs = state.shape
    options = {
        "compute_dtype": state.dtype,
        "compress_statistics": state.nested,
        "quant_type": state.quant_type,
    }
    layer = bnb.nn.Linear4bit(inputs, outputs, bias=False, device="meta", **options)
    layer.weight = bnb.nn.Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        module=layer,
        bnb_quantized=True,
    )
    layer.quant_state = state
    layer.bias = bias
    prepare_(layer, name)
    return layer


def stored_state(layer: str, names: Mapping[str, T]) -> dict[str, T]:
    """The tensors on disk of a 4-bit layer, by bitsandbytes' own names; empty for another layer."""
    prefix = f"{layer}.weight"
    if f"{prefix}.absmax" not in names:
        return {}
    parts = (*_PARTS, *(f".quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")))
    return {part: names[prefix + part] for part in ("", *parts) if prefix + part in names}


def belongs_to_a_weight(name: str, names: Container[str]) -> bool:
    """Return whether a tensor is the scale, codebook or description of a 4-bit layer."""
    weight, found, _ = name.rpartition(".weight.")
    return bool(found) and f"{weight}.weight.absmax" in names


def layer_from_state(
    name: str,
    state: dict[str, Tensor],
    bias: nn.Parameter | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """A `Linear4bit` from what `stored_state` names, with the same codes. Nested scales are
    un-nested.

    Raises:
        ModelError: parts are missing or don't fit together.
    """
    functional = _bitsandbytes().functional
    try:
        facts = {
            part.removeprefix("."): tensor.to(device) for part, tensor in state.items() if part
        }
        quant_state = functional.QuantState.from_dict(facts, device)
        quant_state.dtype = dtype
        outputs, inputs = quant_state.shape
        codes = state[""].to(device)
        whole = codes.dtype == torch.uint8 and codes.numel() * 2 == outputs * inputs
        if not whole or quant_state.absmax.numel() * quant_state.blocksize != outputs * inputs:
            raise ValueError(
                f"codes {tuple(codes.shape)} and scales {tuple(quant_state.absmax.shape)} for "
                f"{outputs}x{inputs}"
            )
    except (KeyError, TypeError, ValueError, AssertionError, AttributeError) as error:
        got = f"{name} is not a whole 4-bit layer: {error}"
        raise ModelError(
            got,
            "codes, scales and their description, as bitsandbytes saves them",
            "download the model again",
        ) from None
    return _layer(codes.view(-1, 1), quant_state, bias, name)


def parts_of(layer: Any) -> tuple[Tensor, Tensor, tuple[int, ...], QuantType, int]:
    """Packed codes, scales, shape [N, K], type and block size."""
    state = layer.weight.quant_state
    return layer.weight.data, state.absmax, tuple(state.shape), state.quant_type, state.blocksize


def state_to_store(layer: Any, scales: Tensor | None = None) -> dict[str, Tensor]:
    """The inverse of `stored_state`: the tensors to write for a `Linear4bit`.

    `scales` replace its own where they are given.
    """
    state = copy(layer.weight.quant_state)
    if scales is not None:
        state.absmax = scales
    return {"": layer.weight.data} | {
        f".{part}": tensor for part, tensor in state.as_dict(packed=True).items()
    }


def dequantized_in(layer: Any, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] of a `Linear4bit` in another dtype than its products have."""
    state = copy(layer.weight.quant_state)
    state.dtype = dtype
    result: Tensor = _bitsandbytes().functional.dequantize_4bit(layer.weight.data, state)
    return result


def prepare_(module: Any, name: str) -> None:
    """Make a `Linear4bit` safe for tuning: never repacked, scales fp32 and not nested.

    Raises:
        ModelError: the layer is not on a device, not quantized yet, already repacked, or has rows
            that are not whole blocks.
    """
    state = getattr(module.weight, "quant_state", None)
    if module.weight.is_meta:
        raise ModelError(
            f"{name} is on the meta device", "weights in memory", "load without CPU or disk offload"
        )
    if state is None:
        raise ModelError(
            f"{name} is not quantized yet",
            "a quantized Linear4bit",
            "move the model to its device first",
        )
    if getattr(state, "packing_format_for_cpu", False):
        raise ModelError(
            f"{name} was repacked by a forward pass; its scales are rounded to bfloat16",
            "a layer in the plain 4-bit layout",
            "load the model again and prepare it before the first forward",
        )
    inputs = state.shape[-1]
    if module.weight.device.type == "cpu" and inputs % state.blocksize:
        raise ModelError(
            f"{name} has {inputs} inputs in blocks of {state.blocksize}",
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
        return _bitsandbytes().functional.dequantize_4bit(
            self.module.weight.data, self.module.weight.quant_state
        )

    def override(self, scales: Tensor) -> None:
        self.module.weight.quant_state.absmax = scales
