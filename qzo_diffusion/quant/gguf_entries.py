"""The tensors of a GGUF file as entries on disk, under the names and shapes of the file.

Only the header is read, and it is checked against the file's length first. A weight in blocks is
read later, alone, as the bytes that it is."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.quant.entries import Entry, Span
from qzo_diffusion.quant.gguf import FACTORS, need_package
from qzo_diffusion.quant.gguf_header import GgufHeader, GgufTensor, check_whole, read_gguf_header

PLAIN = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
}


def read_gguf_entries(file: Path) -> tuple[dict[str, Entry], GgufHeader]:
    """Return every tensor by its name, and the header.

    Raises:
        ModelError: the file is damaged, one part of several, or holds a type that is not known.
    """
    header = read_gguf_header(file)
    check_whole(file, header)
    return {
        name: _entry(file, name, tensor, header.data) for name, tensor in header.tensors.items()
    }, header


def blocks_of(entries: Mapping[str, Entry]) -> dict[str, int]:
    """Return type of blocks -> number of tensors that have it, the most frequent first."""
    kinds = [entry.blocks for entry in entries.values() if entry.blocks is not None]
    return {
        kind: kinds.count(kind) for kind in sorted(set(kinds), key=lambda one: -kinds.count(one))
    }


def blocks_in_words(entries: Mapping[str, Entry]) -> str:
    """Return the types of blocks in words; nothing where there are none."""
    return ", ".join(f"{kind} ({count} tensors)" for kind, count in blocks_of(entries).items())


def blocks_of_row(entry: Entry) -> int:
    """Return the number of blocks in a row of a weight in blocks."""
    package = need_package()
    size, _ = package.GGML_QUANT_SIZES[package.GGMLQuantizationType[entry.blocks]]
    return int(entry.shape[-1]) // int(size)


def _entry(file: Path, name: str, tensor: GgufTensor, data: int) -> Entry:
    package = need_package()
    kind = package.GGMLQuantizationType(tensor.kind).name
    size, count = package.GGML_QUANT_SIZES[package.GGMLQuantizationType(tensor.kind)]
    shape = tensor.shape[::-1]  # ggml has the inputs first
    span = Span(file, data + tensor.offset, math.prod(shape) // size * count)
    if kind in PLAIN:
        return Entry(PLAIN[kind], shape, (span,))
    if kind not in FACTORS:
        raise ModelError(
            f"{file} with {name} of the type {kind}",
            ", ".join((*PLAIN, *FACTORS)),
            "give a file of another type of the same model",
        )
    return Entry(torch.uint8, shape, (span,), blocks=kind)
