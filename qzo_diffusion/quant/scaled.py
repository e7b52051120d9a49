"""Weights of 8 bits whose scale is a tensor beside them, as fp8 files have it.

    w = codes · scale        one scale for the tensor, for each row, or for each block

    <layer>.scale_weight       ComfyUI, with an empty tensor `scaled_fp8` in the file
    <layer>.weight_scale       ComfyUI (with `comfy_quant`), compressed-tensors, ModelOpt
    <layer>.weight_scale_inv   DeepSeek: blocks of 128 x 128; multiplied in spite of its name

Scales of inputs serve products in 8 bits alone and are left out. Whatever is not understood stays
a tensor of its own name, which `quant.fits` refuses beside a weight that is used."""

import contextlib
from collections.abc import Mapping
from dataclasses import replace

import torch

from qzo_diffusion.quant.entries import Entry, Scale
from qzo_diffusion.quant.json_file import parsed_object

WEIGHT_SCALES = ("scale_weight", "weight_scale", "weight_scale_inv")
INPUT_SCALES = ("scale_input", "input_scale")
MARKER, DESCRIPTION = "scaled_fp8", "comfy_quant"
EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise", "int8_rowwise")
DESCRIBED = {"format", "full_precision_matrix_mult"}  # keys that change no weight
LONGEST_DESCRIPTION = 4096  # bytes
BLOCK = 128


def with_scales(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The tensors of a file or folder, each weight with its scale; scales are no tensors of their
    own any more.
    """
    found = dict(entries)
    markers = [name for name in entries if name.rpartition(".")[2] == MARKER]
    scaled = set()
    for name in entries:
        layer, _, part = name.rpartition(".")
        if part in WEIGHT_SCALES and (made := _scaled(layer, name, entries)) is not None:
            scaled.add(f"{layer}.weight")
            found[f"{layer}.weight"] = made
            for beside in (part, *INPUT_SCALES, DESCRIPTION):
                found.pop(f"{layer}.{beside}", None)
    for name in markers:
        del found[name]
    if markers or scaled:
        found |= {
            name: replace(entry, lacks_scale=True)
            for name, entry in found.items()
            if entry.scale is None and entry.dtype in EIGHT_BITS and name.endswith(".weight")
        }
    return found


def _scaled(layer: str, name: str, entries: Mapping[str, Entry]) -> Entry | None:
    weight, scale = entries.get(f"{layer}.weight"), entries[name]
    if weight is None or weight.dtype not in EIGHT_BITS or not scale.dtype.is_floating_point:
        return None
    if sum(f"{layer}.{part}" in entries for part in WEIGHT_SCALES) > 1:
        return None
    if not _is_plain(entries.get(f"{layer}.{DESCRIPTION}")):
        return None
    blocks = _blocks(weight.shape, scale.shape)
    if blocks is None:
        return None
    rows = ((0, weight.shape[0] if weight.shape else 1),)
    return replace(weight, scale=Scale(scale, *blocks, rows))


def _blocks(
    weight: tuple[int, ...], scale: tuple[int, ...]
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Return how many scales lie along rows and columns, and how many of these share one."""
    numel = 1
    for size in scale:
        numel *= size
    if numel == 1 and weight:
        return (1, 1), (weight[0], 2**62)
    if not weight or not numel or min(weight) == 0:
        return None
    if numel == weight[0] == max(scale) and scale[0] == numel:
        return (numel, 1), (1, 2**62)
    if len(weight) != 2 or len(scale) != 2 or scale == (1, weight[0]):
        return None
    sides = [_side(size, count) for size, count in zip(weight, scale, strict=True)]
    rows, columns = sides
    return None if rows is None or columns is None else ((scale[0], scale[1]), (rows, columns))


def _side(size: int, count: int) -> int | None:
    """Return how many of `size` rows share one of `count` scales, a power of two."""
    if count in (1, size):
        return size // count
    if -(-size // BLOCK) == count:
        return BLOCK
    share, rest = divmod(size, count)
    return share if not rest and share.bit_count() == 1 else None


def _is_plain(description: Entry | None) -> bool:
    """Return whether a description only says that codes are multiplied by a scale."""
    if description is None:
        return True
    if description.nbytes > LONGEST_DESCRIPTION:
        return False
    with contextlib.suppress(ValueError):
        facts = parsed_object(bytes(description.read().flatten().tolist()))
        return facts.get("format") in FORMATS and facts.keys() <= DESCRIBED
    return False
