"""1x1 convolutions as the linear layers that they are, so that they are quantized and tuned alike.

Files hold a convolution's weight [N, K, 1, 1] as NAME.weight; here it is NAME.linear.weight [N, K].
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from qzo_diffusion.quant.entries import Entry
from qzo_diffusion.quant.load import handles_of
from qzo_diffusion.quant.weights import Pending

INSIDE = "linear"


class Pointwise(nn.Module):
    """Compute [B, K, h, w] -> [B, N, h, w] by a linear layer on each place of the picture."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.linear(x.flatten(2).transpose(1, 2).contiguous())
        return outputs.transpose(1, 2).unflatten(2, x.shape[2:])


def replace_convolutions_(model: nn.Module) -> None:
    """Put a `Pointwise` in the place of every 1x1 convolution."""
    chosen = [name for name, module in model.named_modules() if _is_pointwise(module)]
    for name in chosen:
        parent, _, child = name.rpartition(".")
        conv = model.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        linear = nn.Linear(
            conv.in_channels,
            conv.out_channels,
            bias=conv.bias is not None,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        setattr(model.get_submodule(parent), child, Pointwise(linear))


def _is_pointwise(module: nn.Module) -> bool:
    return (
        type(module) is nn.Conv2d
        and module.kernel_size == module.stride == (1, 1)
        and module.padding in ((0, 0), "valid")
        and module.groups == 1
    )


def as_linear(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Return the tensors of files under the names of a model with `Pointwise` layers."""
    layers = {
        name.removesuffix(".weight")
        for name, entry in entries.items()
        if name.endswith(".weight") and len(entry.shape) == 4 and entry.shape[2:] == (1, 1)
    }
    found = {}
    for name, entry in entries.items():
        layer, _, part = name.rpartition(".")
        if layer not in layers:
            found[name] = entry
            continue
        shape = entry.shape[:2] if part == "weight" else entry.shape
        found[f"{layer}.{INSIDE}.{part}"] = replace(entry, shape=shape)
    return found


def as_convolutions(
    model: nn.Module, tensors: Mapping[str, Pending], dtype: torch.dtype
) -> dict[str, Pending]:
    """Return the tensors of a model as files hold them; 4-bit weights of 1x1 convolutions are
    dequantized, since no other program reads them.

    Args:
        dtype: of dequantized weights.
    """
    found, handles = dict(tensors), {handle.name: handle for handle in handles_of(model)}
    for name in _layers(model):
        inside = f"{name}.{INSIDE}"
        own = {key: found.pop(key) for key in tensors if key.startswith(f"{inside}.")}
        weight, handle = own[f"{inside}.weight"], handles.get(inside)
        if handle is not None and not weight.dtype.is_floating_point:
            weight = Pending(dtype, _shape(handle.module), _dequantized(handle, dtype))
        found[f"{name}.weight"] = Pending(
            weight.dtype, (*weight.shape, 1, 1), _with_two_more(weight)
        )
        if f"{inside}.bias" in own:
            found[f"{name}.bias"] = own[f"{inside}.bias"]
    return found


def lora_of(model: nn.Module, name: str, down: Tensor, up: Tensor) -> tuple[str, Tensor, Tensor]:
    """Return the name and the factors [R, K] and [N, R] of a layer's LoRA as other programs have
    them: of a 1x1 convolution they are convolutions.
    """
    parent = name.removesuffix(f".{INSIDE}")
    if parent == name or not isinstance(model.get_submodule(parent), Pointwise):
        return name, down, up
    return parent, down[:, :, None, None], up[:, :, None, None]


def _layers(model: nn.Module) -> Iterator[str]:
    return (name for name, module in model.named_modules() if isinstance(module, Pointwise))


def _shape(layer: nn.Module) -> tuple[int, int]:
    return int(layer.out_features), int(layer.in_features)  # type: ignore[arg-type]


def _dequantized(handle: object, dtype: torch.dtype) -> Callable[[], Tensor]:
    return lambda: handle.dequantized().to(dtype)  # type: ignore[attr-defined]


def _with_two_more(weight: Pending) -> Callable[[], Tensor]:
    return lambda: weight.make()[:, :, None, None]
