"""A quantized model from disk in the memory of the quantized model, and a copy of it on disk for
the next start.

The copy is a folder in bitsandbytes' own 4-bit layout, so that it is read by the code that reads
any 4-bit folder. It is hit when name, size, time and safetensors header of every source file and
all settings are what they were; then 4.7 GB are read instead of 16 and nothing is quantized. It is
written aside with a hash of each file and renamed: half a copy is never used, and a copy whose file
is not as long as its header says counts as absent."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from qzo_diffusion.console import report
from qzo_diffusion.core.errors import ModelError, OutputError
from qzo_diffusion.files import COMPLETE, free_bytes, write_folder
from qzo_diffusion.quant.entries import Entry
from qzo_diffusion.quant.header import header_bytes
from qzo_diffusion.quant.stored import pending_tensors
from qzo_diffusion.quant.stream import Filled, Quantization, fill_
from qzo_diffusion.quant.weights import read_entries, write_tensors

WEIGHTS, SOURCE = "model.safetensors", "source.json"
FORMAT = 1  # of what is stored; raised when the same source would give other numbers
SMALLEST_CACHED = 256 * 2**20  # bytes of source; less is quantized in a second


@dataclass(frozen=True)
class Source:
    """What a model is loaded from: its tensors on disk by the model's names, and a function that
    makes the empty model.
    """

    entries: Mapping[str, Entry]
    make_empty: Callable[[], nn.Module]

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())


def load_quantized(
    source: Source,
    quantization: Quantization,
    *,
    dtype: torch.dtype,
    device: torch.device,
    cache: Path | None = None,
    smallest_cached: int = SMALLEST_CACHED,
) -> nn.Module:
    """The 4-bit model on `device`, in eval mode, from the cached copy where there is one.

    Args:
        cache: folder of copies; None: neither read nor written.

    Raises:
        ModelError: see `quant.stream.fill_`.
    """
    stored = _stored_copy(source, quantization, dtype, cache, smallest_cached)
    if stored is not None and (entries := _entries_of(stored)) is not None:
        return _fill(source, entries, quantization, dtype, device, "load 4-bit copy")[0]
    model, filled = _fill(source, source.entries, quantization, dtype, device, "load and quantize")
    if stored is not None and filled.quantized:
        _store(model, stored, _key(source, quantization, dtype))
    return model


def _fill(
    source: Source,
    entries: Mapping[str, Entry],
    quantization: Quantization,
    dtype: torch.dtype,
    device: torch.device,
    what: str,
) -> tuple[nn.Module, Filled]:
    model = source.make_empty()
    total = sum(entry.nbytes for entry in entries.values())
    with tqdm(total=total, desc=what, unit="B", unit_scale=True, leave=False) as bar:
        filled = fill_(
            model, entries, quantization, dtype=dtype, device=device, progress=bar.update
        )
    if filled.unused:
        report(
            f"warning: {len(filled.unused)} tensors on disk have no place in the model, for "
            f"example {filled.unused[0]}"
        )
    return model, filled


def _key(source: Source, quantization: Quantization, dtype: torch.dtype) -> dict[str, Any]:
    """Everything that the quantized numbers depend on."""
    files = sorted({span.file for entry in source.entries.values() for span in entry.spans})
    settings = asdict(quantization) | {"skip": sorted(quantization.skip), "dtype": str(dtype)}
    del settings["activations"]  # of layers that are not stored
    return {
        "format": FORMAT,
        "settings": settings,
        "files": [
            {
                "name": file.name,
                "size": file.stat().st_size,
                "mtime_ns": file.stat().st_mtime_ns,
                "header": hashlib.blake2b(header_bytes(file), digest_size=16).hexdigest(),
            }
            for file in files
        ],
        "names": hashlib.blake2b(
            json.dumps(sorted(source.entries)).encode(), digest_size=16
        ).hexdigest(),
    }


def _stored_copy(
    source: Source,
    quantization: Quantization,
    dtype: torch.dtype,
    cache: Path | None,
    smallest: int,
) -> Path | None:
    if cache is None or source.nbytes < smallest or quantization.backend != "bnb":
        return None
    text = json.dumps(_key(source, quantization, dtype), sort_keys=True)
    return cache / hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _entries_of(stored: Path) -> Mapping[str, Entry] | None:
    """None unless a copy was written to its end and still has its length."""
    if not (stored / COMPLETE).is_file():
        return None
    try:
        return read_entries(stored / WEIGHTS)
    except ModelError as error:
        report(f"warning: a stored 4-bit copy is passed over and made again: {error.got}")
        shutil.rmtree(stored, ignore_errors=True)
        return None


def _store(model: nn.Module, stored: Path, key: Mapping[str, Any]) -> None:
    """Failing is told and does no harm: the model is in memory."""
    tensors = pending_tensors(model)
    size = sum(tensor.nbytes for tensor in tensors.values())

    def write(folder: Path) -> None:
        with tqdm(
            total=size, desc="store 4-bit copy", unit="B", unit_scale=True, leave=False
        ) as bar:
            write_tensors(folder / WEIGHTS, tensors, {}, bar.update)
        (folder / SOURCE).write_text(json.dumps(key, indent=1), encoding="utf-8")

    try:
        stored.parent.mkdir(parents=True, exist_ok=True)
        free = free_bytes(stored.parent)
        if free < 1.05 * size:
            report(
                f"warning: no 4-bit copy is stored for the next start: {size / 1e9:.1f} GB "
                f"needed, {free / 1e9:.1f} GB free"
            )
            return
        write_folder(stored, write)
    except (OutputError, OSError) as error:
        report(
            f"warning: no 4-bit copy is stored for the next start: {getattr(error, 'got', error)}"
        )
