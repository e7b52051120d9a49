"""SDNQ's folders (Disty0), read and dequantized here: 4 and 8 bits, with or without a branch of low
rank and a rotation.

    W = (zero_point + codes · scale + svd_up · svd_down) H, H a Hadamard matrix for runs of inputs

    weight      uint8, two codes a byte, the first in the low half; or uint8 or int8, one a byte
    scale       [N, groups, 1] or [N, 1]
    zero_point  as scale, for codes without a sign; codes with a sign are stored plus 8 in 4 bits
    svd_up      [N, r]        svd_down    [r, K]

Trained are `scale`, with `zero_point` in the same ratio, so that a layer is linear in it, and a
gain for each row of `svd_down`. They are written back under the same names; a ratio of one changes
no byte. Products are computed from fp32 weights, where the package computes them in the dtype of
the scales."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.quant.branched import BranchedLinear, residual_of
from qzo_diffusion.quant.entries import Entry
from qzo_diffusion.quant.weights import Pending

METHOD = "sdnq"
PARTS = ("scale", "zero_point", "svd_up", "svd_down")
# Settings that change the layout of some tensors, and the values that are read.
READ: dict[str, tuple[Any, ...]] = {
    "use_codebook": (None, False),
    "use_codebook_scale": (None, False),
    "use_quantized_matmul": (None, False),
    "scale_dtype": (None, "none"),
    "zero_point_dtype": (None, "none"),
}


def marked(entries: Mapping[str, Entry], settings: Mapping[str, Any]) -> dict[str, Entry]:
    """The tensors of a folder; weights of SDNQ with the length of their rotation, 0 for none.

    Args:
        settings: `quantization_config` of config.json.

    Raises:
        ModelError: a setting that is not read.
    """
    for key, values in READ.items():
        if settings.get(key) not in values:
            raise ModelError(
                f"a folder of SDNQ with {key} = {settings[key]!r}",
                f"{key} = {values[-1]!r}",
                "quantize the model again so, or give it in bf16",
            )
    length = int(settings.get("hadamard_group_size") or 256) if settings.get("use_hadamard") else 0
    return {
        name: replace(entry, rotation=length) if _is_weight(name, entries) else entry
        for name, entry in entries.items()
    }


def _is_weight(name: str, entries: Mapping[str, Entry]) -> bool:
    return name.endswith(".weight") and f"{name.removesuffix('.weight')}.scale" in entries


def belongs_to_a_weight(name: str, entries: Mapping[str, Entry]) -> bool:
    """Return whether a tensor is a scale or a factor beside a weight of SDNQ."""
    layer, _, part = name.rpartition(".")
    weight = entries.get(f"{layer}.weight")
    return part in PARTS and weight is not None and weight.rotation is not None


def stored_state(layer: str, entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    """The tensors on disk of a layer."""
    parts = ("weight", *PARTS)
    return {
        part: entries[f"{layer}.{part}"].read() for part in parts if f"{layer}.{part}" in entries
    }


def layer_from_state(
    name: str, state: Mapping[str, Tensor], rotation: int, linear: Any, device: torch.device
) -> BranchedLinear:
    """The layer in the place of `linear`, on `device`. Raises ModelError for parts that don't fit
    together.
    """
    outputs, inputs = linear.out_features, linear.in_features
    try:
        scale = state["scale"].to(device).float().reshape(outputs, -1)
        codes, zero, bits = _codes(state["weight"].to(device), outputs * inputs)
        codes = codes.reshape(outputs, scale.shape[1], -1)
        zeros = torch.full_like(scale, zero)
        if "zero_point" in state:
            point = state["zero_point"].to(device).float().reshape(scale.shape)
            if ((scale == 0) & (point != 0)).any():
                raise ValueError("a group of equal weights, whose scale is zero")
            zeros = torch.where(scale == 0, 0.0, -point / scale)
        elif state["weight"].dtype == torch.uint8 and bits == 8:
            raise ValueError("codes without a sign need a zero_point")
        branch = None
        if "svd_up" in state:
            up, down = state["svd_up"].to(device), state["svd_down"].to(device)
            if up.shape != (outputs, len(down)) or down.shape[1] != inputs:
                raise ValueError(f"svd_up {tuple(up.shape)}, svd_down {tuple(down.shape)}")
            branch = (up, down)
    except (KeyError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{name} is no layer of SDNQ that is read: {error}",
            "codes of 4 or 8 bits and their scales, for a linear layer",
            "quantize the model again, or give it in bf16",
        ) from None
    run = rotation_of(inputs, rotation)
    return BranchedLinear(residual_of(codes, zeros, scale, bits), branch, linear.bias, hadamard=run)


def _codes(stored: Tensor, count: int) -> tuple[Tensor, float, int]:
    """Codes uint8, the code of zero where there is no zero_point, and their bits."""
    if stored.dtype == torch.uint8 and stored.numel() * 2 == count:
        flat = stored.flatten()
        return torch.stack([flat & 15, flat >> 4], 1), 8.0, 4
    if stored.numel() != count or stored.dtype not in (torch.uint8, torch.int8):
        raise ValueError(f"weight {stored.dtype} {tuple(stored.shape)} for {count} weights")
    if stored.dtype == torch.int8:
        return (stored.to(torch.int16) + 128).to(torch.uint8), 128.0, 8
    return stored, 0.0, 8


def rotation_of(inputs: int, longest: int) -> int:
    """The length of the rotated runs: a power of two that divides the inputs; 0 for none."""
    if not longest:
        return 0
    length = 1 << (min(inputs, longest) - 1).bit_length()
    while inputs % length:
        length //= 2
    return length if length >= 4 else 0


def pending_tensors(
    entries: Mapping[str, Entry], scales: Mapping[str, Tensor]
) -> dict[str, Pending]:
    """All tensors of the folder, with these scales.

    Args:
        scales: of `<layer>.residual` and `<layer>.down`.
    """
    found = {}
    for name, entry in entries.items():
        made = _tuned(name, entries, scales) if belongs_to_a_weight(name, entries) else None
        found[name] = Pending.of(entry.read() if made is None else made)
    return found


def _tuned(name: str, entries: Mapping[str, Entry], scales: Mapping[str, Tensor]) -> Tensor | None:
    layer, _, part = name.rpartition(".")
    stored = entries[name].read()
    if part == "svd_down":
        gains = scales[f"{layer}.down"].cpu().unsqueeze(1)
        return (stored.float() * gains).to(stored.dtype)
    if part == "svd_up":
        return None
    base = entries[f"{layer}.scale"].read().float()
    wanted = scales[f"{layer}.residual"].cpu().view(base.shape)
    if part == "scale":
        return wanted.to(stored.dtype)
    ratio = torch.where(base == 0, 1.0, wanted / base)
    return (stored.float() * ratio).to(stored.dtype)
