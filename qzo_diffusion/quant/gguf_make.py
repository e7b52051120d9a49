"""Write a transformer as a new GGUF file, one tensor in memory at a time.

The package gguf quantizes to types of 32 weights a block; blocks of 256 are made here
(`gguf_kquants`). Which tensors stay as they are follows ComfyUI-GGUF's tools, so that its loader
finds what it expects."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.quant.gguf import AT_ONCE, dequantized, need_package
from qzo_diffusion.quant.gguf_kquants import quantize_k
from qzo_diffusion.quant.weights import Pending

Type = Literal["Q4_0", "Q8_0", "Q4_K_M"]
PLAIN: Mapping[str, Any] = {"F32": np.float32, "F16": np.float16}
LARGEST = 65504
SMALL = 1024  # numbers of a tensor that is kept in fp32
# ggml's numbers of the type that most of a file has, `general.file_type`
FILE_TYPES: Mapping[Type, int] = {"Q4_0": 2, "Q8_0": 7, "Q4_K_M": 15}


@dataclass(frozen=True)
class Target:
    """A file that is made.

    kind: the type that most of its tensors get. architecture: what `general.architecture` says.
    kept: how the names of tensors begin that stay in 16 bits.
    """

    file: Path
    kind: Type
    architecture: str
    kept: tuple[str, ...] = ()


def write_quantized(
    target: Target,
    tensors: Mapping[str, Pending],
    progress: Callable[[int], object] = lambda nbytes: None,
) -> float:
    """Write the tensors of a transformer in the original layout.

    Args:
        tensors: by their names in the layout, without a prefix.

    Returns the relative error of the weights that were quantized (root of mean squares).

    Raises:
        ModelError: a weight beyond the range of fp16.
    """
    kinds = {name: type_of(name, one.shape, target) for name, one in tensors.items()}
    shapes = {name: one.shape for name, one in tensors.items()}
    squares = [0.0, 0.0]

    def data(name: str) -> np.ndarray:
        stored = _stored(tensors[name].make().detach().cpu().float(), kinds[name], squares)
        progress(tensors[name].nbytes)
        return stored

    write_file(target, kinds, shapes, data)
    return math.sqrt(squares[0] / squares[1]) if squares[1] else 0.0


def write_file(
    target: Target,
    kinds: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    data: Callable[[str], np.ndarray],
) -> None:
    """Write a GGUF file whose tensors are made one after the other.

    Args:
        kinds: ggml's name of each tensor's type. data: makes a tensor's numbers or blocks, in the
            order of `kinds`.
    """
    package = need_package()
    writer = package.GGUFWriter(target.file, target.architecture)
    writer.add_quantization_version(package.GGML_QUANT_VERSION)
    writer.add_file_type(FILE_TYPES[target.kind])
    for name, of_kind in kinds.items():
        number, shape = package.GGMLQuantizationType[of_kind], shapes[name]
        size, count = package.GGML_QUANT_SIZES[number]
        of_row = shape[-1] // size * count  # bytes
        writer.add_tensor_info(
            name,
            shape if of_kind in PLAIN else (*shape[:-1], of_row),
            np.dtype(PLAIN.get(of_kind, np.uint8)),
            math.prod(shape[:-1]) * of_row,
            number,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in kinds:
        writer.write_tensor_data(data(name))
    writer.close()


def type_of(name: str, shape: tuple[int, ...], target: Target) -> str:
    """Return ggml's name of the type that a tensor gets."""
    if len(shape) == 1 or math.prod(shape) <= SMALL:
        return "F32"
    if len(shape) != 2 or name.startswith(target.kept):
        return "F16"
    # a fused q, k, v gets a bit more, as llama.cpp's mixture "medium" has it
    found = {"Q4_K_M": "Q5_K" if ".qkv." in name else "Q4_K"}.get(target.kind, str(target.kind))
    size, _ = need_package().GGML_QUANT_SIZES[need_package().GGMLQuantizationType[found]]
    return found if shape[-1] % size == 0 else "F16"


def _stored(weight: Tensor, kind: str, squares: list[float]) -> np.ndarray:
    """The bytes of a tensor; adds the squares of errors and of weights to `squares`."""
    if kind in PLAIN:
        if kind == "F16" and float(weight.abs().max()) > LARGEST:
            raise ModelError(
                f"a weight of {float(weight.abs().max()):.3g}",
                f"weights up to {LARGEST}, the largest number of fp16",
                "export as bf16",
            )
        return weight.numpy().astype(PLAIN[kind])
    package = need_package()
    count = max(1, AT_ONCE // weight.shape[1])
    parts = []
    for rows in weight.split(count):
        codes = (
            quantize_k(rows, kind)
            if kind.endswith("_K")
            else torch.from_numpy(
                package.quants.quantize(rows.numpy(), package.GGMLQuantizationType[kind])
            )
        )
        squares[0] += float((dequantized(codes, kind) - rows).double().square().sum())
        squares[1] += float(rows.double().square().sum())
        parts.append(codes)
    return torch.cat(parts).numpy()
