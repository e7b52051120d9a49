"""Load a quantized model from disk in the memory of the quantized model, and keep a copy on disk
for the next start.

The copy is a folder in bitsandbytes' own 4-bit layout, so the code for any 4-bit folder reads it.
It is used if all settings are the same, and name, size, time and safetensors header of every source
file. A start then reads 4.7 GB instead of 16 and quantizes nothing.

The copy is written under another name with a checksum of each tensor, then renamed, so half a copy
is never used. Checksums are compared while tensors are read (crc32, 1.9 GB/s); a damaged copy is
made again. A copy that another user owns, or that anybody can write, is not used.
"""

import hashlib
import json
import os
import shutil
import stat
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qzo_diffusion.core.errors import ModelError, OutputError
from qzo_diffusion.quant.entries import Entry, bytes_of, damaged
from qzo_diffusion.quant.gguf_header import is_gguf
from qzo_diffusion.quant.header import header_bytes
from qzo_diffusion.quant.json_file import read_object
from qzo_diffusion.quant.stored import pending_tensors
from qzo_diffusion.quant.stream import Filled, Quantization, fill_
from qzo_diffusion.quant.weights import Pending, read_entries, write_tensors
from qzo_diffusion.system.console import report
from qzo_diffusion.system.files import COMPLETE, free_bytes, write_folder
from qzo_diffusion.system.progress import Progress

WEIGHTS, SOURCE = "model.safetensors", "source.json"
FORMAT = 1  # raise it when the same source gives other numbers
SMALLEST_CACHED = 256 * 2**20  # bytes of source; a smaller model is quantized in a second


@dataclass(frozen=True)
class Source:
    """The source of a model: its tensors on disk by the model's names, and a function that makes
    the empty model.
    """

    entries: Mapping[str, Entry]
    make_empty: Callable[[], nn.Module]

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def files(self) -> list[Path]:
        return sorted({span.file for entry in self.entries.values() for span in entry.spans})


def load_quantized(
    source: Source,
    quantization: Quantization,
    *,
    dtype: torch.dtype,
    device: torch.device,
    cache: Path | None = None,
    smallest_cached: int = SMALLEST_CACHED,
) -> nn.Module:
    """Load the 4-bit model on `device` in eval mode, from the cached copy if there is one.

    Args:
        cache: the folder of copies; with None no copy is read or written.

    Raises:
        ModelError: see `quant.stream.fill_`.
    """
    stored = _stored_copy(source, quantization, dtype, cache, smallest_cached)
    if stored is not None and (entries := _entries_of(stored)) is not None:
        try:
            return _fill(source, entries, quantization, dtype, device, "load 4-bit copy")[0]
        except ModelError as error:
            _remove(stored, error)
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
    with Progress(total=total, desc=what, unit="B", unit_scale=True, leave=False) as bar:
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
    """Return everything that the quantized numbers depend on."""
    settings = asdict(quantization) | {"skip": sorted(quantization.skip), "dtype": str(dtype)}
    del settings["activations"]  # only layers that are not stored have it
    return {
        "format": FORMAT,
        "settings": settings,
        "files": [
            {
                "name": file.name,
                "size": file.stat().st_size,
                "mtime_ns": file.stat().st_mtime_ns,
                "header": _header_of(file),
            }
            for file in source.files
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
    if any(is_gguf(file) for file in source.files):  # most are quantized as they are
        return None
    text = json.dumps(_key(source, quantization, dtype), sort_keys=True)
    if cache.exists() and not _is_ours(cache):
        report(f"warning: no 4-bit copy is used or stored: others can write into {cache}")
        return None
    return cache / hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _is_ours(path: Path) -> bool:
    """Return whether this user alone owns and can change a file or folder; a group may have one
    member.
    """
    facts = path.lstat()
    if not hasattr(os, "getuid"):  # Windows, which keeps no such modes
        return True
    return facts.st_uid == os.getuid() and not facts.st_mode & stat.S_IWOTH


def _entries_of(stored: Path) -> Mapping[str, Entry] | None:
    """Return the tensors of a copy with their checksums.

    Return None unless this user wrote it to its end, and header and length are unchanged.
    """
    if not (stored / COMPLETE).is_file():
        return None
    if not all(map(_is_ours, (stored, *stored.iterdir()))):
        report(f"warning: a stored 4-bit copy is not used, since others can write it: {stored}")
        return None
    try:
        entries = read_entries(stored / WEIGHTS)
        facts = read_object(stored / SOURCE, "the description of a copy")
        sums = facts.get("crc32")
        if facts.get("header") != _header_of(stored / WEIGHTS) or not isinstance(sums, dict):
            raise damaged(stored / WEIGHTS, "it is not what was written")
        if sums.keys() != entries.keys() or any(type(one) is not int for one in sums.values()):
            raise damaged(stored / SOURCE, "it lacks the sum of a tensor")
    except ModelError as error:
        _remove(stored, error)
        return None
    return {name: replace(entry, crc32=sums[name]) for name, entry in entries.items()}


def _remove(stored: Path, error: ModelError) -> None:
    report(f"warning: a stored 4-bit copy is not used and made again: {error.got}")
    shutil.rmtree(stored, ignore_errors=True)


def _header_of(file: Path) -> str:
    return hashlib.blake2b(header_bytes(file), digest_size=16).hexdigest()


def _with_sums(tensors: Mapping[str, Pending], sums: dict[str, int]) -> dict[str, Pending]:
    """Return the same tensors; each stores the checksum of its bytes in `sums` when it is made."""

    def summed(name: str, one: Pending) -> Pending:
        def make() -> Tensor:
            tensor = one.make().detach().cpu().contiguous()
            sums[name] = zlib.crc32(bytes_of(tensor))
            return tensor

        return replace(one, make=make)

    return {name: summed(name, one) for name, one in tensors.items()}


def _store(model: nn.Module, stored: Path, key: Mapping[str, Any]) -> None:
    """Store the copy. A failure only warns: the model is in memory."""
    tensors = pending_tensors(model)
    size = sum(tensor.nbytes for tensor in tensors.values())

    def write(folder: Path) -> None:
        with Progress(
            total=size, desc="store 4-bit copy", unit="B", unit_scale=True, leave=False
        ) as bar:
            sums: dict[str, int] = {}
            write_tensors(folder / WEIGHTS, _with_sums(tensors, sums), {}, bar.update)
        facts = dict(key) | {"header": _header_of(folder / WEIGHTS), "crc32": sums}
        (folder / SOURCE).write_text(json.dumps(facts, indent=1), encoding="utf-8")
        folder.chmod(0o700)

    try:
        stored.parent.parent.mkdir(parents=True, exist_ok=True)
        stored.parent.mkdir(mode=0o700, exist_ok=True)
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
