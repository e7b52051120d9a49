"""The tensors of a quantized model for a file, made one at a time.

They are in bitsandbytes' layout with the same codes, or dequantized."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.quant import bnb
from qzo_diffusion.quant.branched import BranchedLinear
from qzo_diffusion.quant.load import handles_of
from qzo_diffusion.quant.weights import Pending


def pending_tensors(
    model: nn.Module, scales: Mapping[str, Tensor] | None = None
) -> dict[str, Pending]:
    """Everything that `save_pretrained` of a bitsandbytes model would write; tied weights once.

    Args:
        scales: by layer, in place of the live ones.

    Raises:
        ModelError: a layer is not of bitsandbytes.
    """
    tensors: dict[str, Pending] = {}
    for handle in handles_of(model):
        if not isinstance(handle, bnb.BnbHandle):
            raise ModelError(
                f"{handle.name} is no layer of bitsandbytes",
                "layers in its layout",
                "export as bf16, or train with quant.backend=bnb",
            )
        state = bnb.state_to_store(handle.module, None if scales is None else scales[handle.name])
        tensors |= {
            f"{handle.name}.weight{part}": Pending.of(tensor) for part, tensor in state.items()
        }
    return tensors | _not_quantized(model, None)


def pending_dequantized(model: nn.Module, dtype: torch.dtype) -> dict[str, Pending]:
    """The plain model in `dtype`, each weight computed from codes and the scales that are shown
    when its turn comes.
    """
    tensors: dict[str, Pending] = {}
    branched = _branched(model)
    whole: dict[str, Any] = dict(branched)
    whole |= {one.name: one for one in handles_of(model) if _owner(one.name) not in branched}
    for name, layer in whole.items():
        shape = _shape(model.get_submodule(name))
        tensors[f"{name}.weight"] = Pending(dtype, shape, _dequantize(layer, dtype))
    return tensors | _not_quantized(model, dtype)


def _branched(model: nn.Module) -> dict[str, BranchedLinear]:
    """The layers that have several handles and one weight."""
    return {name: one for name, one in model.named_modules() if isinstance(one, BranchedLinear)}


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _not_quantized(model: nn.Module, dtype: torch.dtype | None) -> dict[str, Pending]:
    quantized = {
        id(handle.module.weight)
        for handle in handles_of(model)
        if isinstance(handle, bnb.BnbHandle)
    }
    inside = {
        f"{handle.name}.{part}"
        for handle in handles_of(model)
        for part in ("codes", "absmax", "scales")
    }
    inside |= {
        f"{layer}.{part}"
        for layer, module in _branched(model).items()
        for part, _ in module.named_buffers()
    }
    named: list[tuple[str, Tensor]] = [
        (name, tensor) for name, tensor in model.named_parameters() if id(tensor) not in quantized
    ]
    named += [
        (name, tensor)
        for name, tensor in model.named_buffers()
        if name not in inside and _is_persistent(model, name)
    ]
    return {name: _cast(tensor.detach(), dtype) for name, tensor in named}


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Pending:
    if dtype is None or not tensor.is_floating_point() or tensor.dtype == dtype:
        return Pending.of(tensor)
    return Pending(dtype, tuple(tensor.shape), lambda: tensor.to(dtype))


def _dequantize(handle: Any, dtype: torch.dtype) -> Any:
    return lambda: handle.dequantized().to(dtype)


def _shape(module: Any) -> tuple[int, int]:
    return module.out_features, module.in_features


def _is_persistent(model: nn.Module, name: str) -> bool:
    parent, _, child = name.rpartition(".")
    return child not in model.get_submodule(parent)._non_persistent_buffers_set
