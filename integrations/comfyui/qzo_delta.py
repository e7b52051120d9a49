"""A node for ComfyUI: apply a delta of qzo_diffusion to a loaded NF4 or GGUF model.

Copy this file into ComfyUI's `custom_nodes/`, and install qzo_diffusion into ComfyUI's Python. The
delta is made by `qzo-diffuse export --run RUN --format delta`; its run was tuned over the codes of
the model that the loader reads.

Nothing is written into the loaded model. While it predicts, its layers use other scales, and
afterwards their own again, bit for bit. So one loaded model serves several branches of a workflow.

    Load model (NF4 or GGUF) -> QZO delta -> KSampler
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qzo_diffusion.config.files import load_config
from qzo_diffusion.core.errors import ModelError, OutputError
from qzo_diffusion.core.merge import merge_changes_
from qzo_diffusion.core.scales import ScaleHandle, ScaleSet
from qzo_diffusion.diffusion.families.sd3 import SD3
from qzo_diffusion.diffusion.families.sd3_layout import layout
from qzo_diffusion.quant import base, bnb
from qzo_diffusion.quant.gguf import FACTORS, GgufLinear
from qzo_diffusion.runs.locate import locate
from qzo_diffusion.runs.tuned import load_tuned

Wrapper = Callable[[Callable[..., Tensor], Mapping[str, Any]], Tensor]
"""ComfyUI calls it in place of the model: (the model's own function, its arguments by name)."""


class QzoDelta:
    """ComfyUI's protocol: the inputs, the outputs, and the name of the method that is called."""

    CATEGORY = "model_patches"
    FUNCTION = "apply"
    RETURN_TYPES = ("MODEL",)
    DESCRIPTION = "Applies a delta of qzo_diffusion to an NF4 or GGUF model."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's name)
        """The model, the delta's folder, the strength, and the noise levels with tuned scales."""
        level = {"min": 0.0, "max": 1.0, "step": 0.01}
        return {
            "required": {
                "model": ("MODEL",),
                "delta": ("STRING", {"default": "", "tooltip": "folder of an exported delta"}),
                "strength": (
                    "FLOAT",
                    {"default": 1.0, "min": -2.0, "max": 2.0, "step": 0.05},
                ),
                "lowest_level": ("FLOAT", {"default": 0.0, **level}),
                "highest_level": ("FLOAT", {"default": 1.0, **level}),
            }
        }

    def apply(
        self, model: Any, delta: str, strength: float, lowest_level: float, highest_level: float
    ) -> tuple[Any]:
        """Return a copy of ComfyUI's model object whose predictions use the tuned scales.

        Raises:
            ModelError: the model has other codes than the run's base, or no such layers.
            OutputError: there is no delta at this place, or it is damaged.
        """
        network = model.model.diffusion_model
        tuned = _tuned(network, Path(delta.strip()), strength)
        earlier: Wrapper = model.model_options.get("model_function_wrapper") or _plain
        levels = lowest_level, highest_level

        def predict(function: Callable[..., Tensor], call: Mapping[str, Any]) -> Tensor:
            inside = levels[0] <= float(call["timestep"].flatten()[0]) <= levels[1]
            with _shown(network, tuned) if inside else nullcontext():
                return earlier(function, call)

        patched = model.clone()
        patched.set_model_unet_function_wrapper(predict)
        return (patched,)


NODE_CLASS_MAPPINGS = {"QzoDelta": QzoDelta}
NODE_DISPLAY_NAME_MAPPINGS = {"QzoDelta": "QZO delta"}


def _plain(function: Callable[..., Tensor], call: Mapping[str, Any]) -> Tensor:
    return function(call["input"], call["timestep"], **call["c"])


@dataclass(frozen=True)
class _Part:
    """The scales of one of diffusers' layers, which are rows of a layer of ComfyUI."""

    name: str
    scales: Tensor
    module: Any

    def override(self, scales: Tensor) -> None:
        raise NotImplementedError("parts are read and never shown")


class _GgufHandle:
    """The scales of a linear of ComfyUI-GGUF: its weight has `tensor_type` and raw bytes.

    Its own forward dequantizes factors of 16 bits. While other scales are shown, the layer has the
    forward of `GgufLinear`, whose factors are fp32.
    """

    def __init__(self, name: str, module: Any) -> None:
        self.name, self.module = name, module
        if getattr(module.weight, "patches", None):
            raise ModelError(
                f"{name} with a LoRA on its GGUF weight",
                "a model without another patch of weights",
                "leave the LoRA out, or mix runs before you export the delta",
            )
        codes = _as_plain(module.weight)
        outputs = int(module.weight.tensor_shape[0])
        kind = module.weight.tensor_type.name
        self._layer = GgufLinear(codes.reshape(outputs, -1), kind, None, None)
        self.scales = self._layer.scales

    @property
    def codes(self) -> Tensor:
        return self._layer.codes

    def override(self, scales: Tensor) -> None:
        if scales is self.scales:
            self.module.__dict__.pop("forward", None)
        else:
            self._layer.scales = scales
            self.module.forward = self._forward

    def _forward(self, x: Tensor) -> Tensor:
        bias = self.module.bias
        added = None if bias is None else _as_plain(bias).to(x)
        return F.linear(x, self._layer.dequantized(x.dtype).to(x.device), added)


def _as_plain(tensor: Tensor) -> Tensor:
    return tensor.detach().as_subclass(torch.Tensor)


def _handle(name: str, module: Any) -> bnb.BnbHandle | _GgufHandle | None:
    """Access to the scales of a layer; None where it is not quantized."""
    weight = getattr(module, "weight", None)
    if getattr(weight, "quant_state", None) is not None:
        bnb.prepare_(module, name)
        return bnb.BnbHandle(name, module)
    kind = getattr(getattr(weight, "tensor_type", None), "name", None)
    return _GgufHandle(name, module) if kind in FACTORS else None


def _live(network: nn.Module, names: Iterable[str]) -> ScaleSet:
    """The scales of these layers as they lie now; ComfyUI moves models between devices."""
    handles: list[ScaleHandle] = []
    for name in names:
        if (handle := _handle(name, network.get_submodule(name))) is not None:
            handles.append(handle)
    return ScaleSet(handles)


def _shown(network: nn.Module, tuned: dict[str, Tensor]) -> AbstractContextManager[None]:
    """While open, layers use the scales in `tuned`, which move to their device and stay there."""
    live = _live(network, tuned)

    def of_tuned(names: Sequence[str]) -> dict[str, Tensor]:
        for name in names:
            tuned[name] = tuned[name].to(live[name])
        return {name: tuned[name] for name in names}

    return live.override(of_tuned)


def _tuned(network: nn.Module, delta: Path, strength: float) -> dict[str, Tensor]:
    """The scales that each of ComfyUI's layers shall use, in the shape of its own."""
    found = load_tuned(delta)
    layers = _layers(network, _skipped(delta))
    if not layers:
        raise ModelError(
            "a model without quantized layers of Stable Diffusion 3",
            "an NF4 or GGUF model of Stable Diffusion 3 or 3.5",
            "load it with the loader of its format",
        )
    codes, parts = [], []
    for handle, pieces in layers.values():
        count = len(pieces.names)
        cut = zip(_rows(handle.codes, pieces), _rows(handle.scales, pieces), strict=True)
        for piece, (of_codes, of_scales) in zip(pieces.names, cut, strict=True):
            module = SimpleNamespace(out_features=_outputs(handle) // count)
            layer = piece.removesuffix(".weight")
            codes.append((layer, of_codes))
            parts.append(_Part(layer, of_scales.clone(), module))
    found.check(base.fingerprint(codes))
    scales = ScaleSet(parts)
    merge_changes_(scales, [(found.over(scales), strength)])
    return {
        name: _joined([scales[piece.removesuffix(".weight")] for piece in pieces.names], pieces)
        .view_as(handle.scales)
        .contiguous()
        for name, (handle, pieces) in layers.items()
    }


def _layers(network: nn.Module, skip: list[str]) -> dict[str, tuple[Any, Any]]:
    """Name of a quantized layer of ComfyUI -> its handle, and diffusers' layers that are its rows.

    Of a GGUF file a run trains all layers, of other models those outside `skip`.
    """
    found = {}
    for name, pieces in _table(network).items():
        handle = _handle(name, network.get_submodule(name))
        skipped = any(base.is_skipped(piece, skip) for piece in pieces.names)
        if handle is not None and not (skipped and isinstance(handle, bnb.BnbHandle)):
            found[name] = handle, pieces
    return found


def _table(network: nn.Module) -> Mapping[str, Any]:
    """Name of a layer of ComfyUI -> names of diffusers' layers that are its rows."""
    names = dict(network.named_modules())
    blocks = [int(name.split(".")[1]) for name in names if name.startswith("joint_blocks.")]
    dual = [at for at in set(blocks) if f"joint_blocks.{at}.x_block.attn2.qkv" in names]
    return {
        original.removesuffix(".weight"): pieces
        for original, pieces in layout(max(blocks, default=-1) + 1, dual, False).items()
        if original.removesuffix(".weight") in names
    }


def _skipped(delta: Path) -> Sequence[str]:
    """The layers that the run left unquantized."""
    try:
        named = load_config(locate(delta).need("style").settings()).quant.skip
    except OutputError:  # scales without settings
        named = None
    return SD3.denoiser.skip if named is None else named


def _outputs(handle: bnb.BnbHandle | _GgufHandle) -> int:
    if isinstance(handle, bnb.BnbHandle):
        return int(handle.module.weight.quant_state.shape[0])
    return int(handle.codes.shape[0])


def _rows(tensor: Tensor, pieces: Any) -> Iterator[Tensor]:
    """The part of each of diffusers' layers in codes or scales; their rows follow each other."""
    whole = torch.cat(tensor.chunk(2)[::-1]) if pieces.swapped else tensor
    return iter(whole.chunk(len(pieces.names)))


def _joined(parts: list[Tensor], pieces: Any) -> Tensor:
    whole = torch.cat(parts)
    return torch.cat(whole.chunk(2)[::-1]) if pieces.swapped else whole
