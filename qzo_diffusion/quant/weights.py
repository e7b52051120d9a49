"""Tensors in safetensors files, read one at a time into memory of their own, and written one at a
time.

`safe_open` maps a file, and its mapped pages count as memory of the process for as long as any of
its tensors lives (reading 640 MB raised it by 615). `save_file` wants all tensors at once. Here the
header says where a tensor lies, plain reads fetch it, and a file is written from functions that
make one tensor after the other."""

import contextlib
import json
import math
import mmap
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from qzo_diffusion.core.errors import ModelError, OutputError

# fmt: off
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}
# fmt: on
NAMES = {dtype: name for name, dtype in DTYPES.items()}
OWN_PAGES = 2**12  # bytes, from which a tensor gets pages of its own
HUGE = 2**23  # bytes, from which they are large pages
LONGEST_HEADER = 100_000_000  # bytes, the limit of the format


@dataclass(frozen=True)
class Span:
    """Neighbouring bytes of a file."""

    file: Path
    start: int
    size: int


@dataclass(frozen=True)
class Entry:
    """A tensor on disk; its bytes are those of its spans, one after the other."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    spans: tuple[Span, ...]

    @property
    def nbytes(self) -> int:
        return sum(span.size for span in self.spans)

    def rows(self, start: int, stop: int) -> "Entry":
        """Rows start .. stop-1 of a tensor of one span."""
        (span,) = self.spans
        of_a_row = span.size // self.shape[0]
        part = replace(span, start=span.start + start * of_a_row, size=(stop - start) * of_a_row)
        return Entry(self.dtype, (stop - start, *self.shape[1:]), (part,))

    def read(self) -> Tensor:
        """The tensor on the CPU. Raises ModelError when the file ends before it."""
        tensor = empty_pages(self.shape, self.dtype)
        target = (
            tensor.reshape(-1).view(torch.uint8).numpy().data if self.nbytes else memoryview(b"")
        )
        for span in self.spans:
            _read_into(target[: span.size], span)
            target = target[span.size :]
        return tensor


def empty_pages(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Uninitialized memory in pages of its own on the CPU, given back when the tensor goes.

    Weights that stay and weights that pass, mixed in the allocator's heap, leave holes: SD3.5 Large
    was 2.2 GB larger for it."""
    size = math.prod(shape) * dtype.itemsize
    if size < OWN_PAGES:
        return torch.empty(tuple(shape), dtype=dtype)
    pages = mmap.mmap(-1, size)
    if size >= HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        # fewer page faults: reading 4.8 GB takes as long as the reading alone
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8).view(dtype).view(tuple(shape))


def joined(parts: Sequence[Entry]) -> Entry:
    """The rows of all parts, one after the other."""
    rows = sum(part.shape[0] for part in parts)
    return Entry(
        parts[0].dtype,
        (rows, *parts[0].shape[1:]),
        tuple(span for part in parts for span in part.spans),
    )


def read_header(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Where each tensor of a safetensors file lies, and the file's metadata.

    Raises:
        ModelError: the file is missing, is not in this format, or is shorter than it says.
    """
    header, begin = _parsed_header(file)
    size = file.stat().st_size
    try:
        metadata = header.pop("__metadata__", {})
        entries = {name: _entry(file, facts, begin) for name, facts in header.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(file, f"its header is wrong: {error}") from None
    ends = [span.start + span.size for entry in entries.values() for span in entry.spans]
    if max(ends, default=begin) != size:
        raise _damaged(
            file, f"it has {size} bytes where its header speaks of {max(ends, default=begin)}"
        )
    return entries, metadata


def header_bytes(file: Path) -> bytes:
    """The raw header: changes with every name, shape, dtype and place of a tensor.

    Raises ModelError.
    """
    try:
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if length > min(LONGEST_HEADER, file.stat().st_size - 8):
                raise _damaged(file, "it has no header")
            return handle.read(length)
    except OSError as error:
        raise _damaged(file, str(error.strerror or error)) from None


def weight_files(place: Path) -> list[Path]:
    """The safetensors files that a folder of one model means: those its index names, or its one
    file.

    Args:
        place: the folder, or a file, which stands for itself.

    Raises:
        ModelError: there are none, one is missing, or it is not clear which are meant.
    """
    if place.is_file():
        return [place]
    for stem in ("diffusion_pytorch_model", "model"):
        if (index := place / f"{stem}.safetensors.index.json").is_file():
            return _indexed_files(index)
        if (file := place / f"{stem}.safetensors").is_file():
            return [file]
    indexes, files = sorted(place.glob("*.index*.json")), sorted(place.glob("*.safetensors"))
    if len(indexes) == 1:
        return _indexed_files(indexes[0])
    if len(files) == 1:
        return files
    got = (
        f"{place} holds {len(files)} safetensors files and no index"
        if files
        else f"{place} holds no safetensors file"
    )
    raise ModelError(
        got,
        "model.safetensors, or several with model.safetensors.index.json",
        "download the model again",
    )


def read_entries(place: Path) -> dict[str, Entry]:
    """All tensors of a model's folder or of a single file, by name. Raises ModelError."""
    return {
        name: entry for file in weight_files(place) for name, entry in read_header(file)[0].items()
    }


@dataclass(frozen=True)
class Pending:
    """A tensor that is made when its turn to be written comes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: Tensor) -> "Pending":
        return cls(tensor.dtype, tuple(tensor.shape), lambda: tensor)


def write_tensors(
    file: Path,
    tensors: Mapping[str, Pending],
    metadata: Mapping[str, str],
    progress: Callable[[int], object] = lambda nbytes: None,
) -> None:
    """A safetensors file, one tensor in memory at a time, synced; a kill leaves half of it, so
    write it aside.

    Raises:
        ValueError: a tensor is not of the shape and dtype that were announced.
    """
    # Whole words first: a tensor that starts at an odd place can't be viewed in its dtype when it
    # is mapped.
    order = sorted(
        tensors, key=lambda name: -tensors[name].dtype.itemsize if tensors[name].nbytes % 8 else -8
    )
    header: dict[str, object] = {"__metadata__": {"format": "pt"} | dict(metadata)}
    end = 0
    for name in order:
        one = tensors[name]
        header[name] = {
            "dtype": NAMES[one.dtype],
            "shape": list(one.shape),
            "data_offsets": [end, end + one.nbytes],
        }
        end += one.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensor = tensors[name].make().detach().cpu().contiguous()
            if tensor.dtype != tensors[name].dtype or tuple(tensor.shape) != tensors[name].shape:
                raise ValueError(
                    f"{name}: {tensor.dtype} {tuple(tensor.shape)} where {tensors[name]} was "
                    "announced"
                )
            if tensor.numel():
                handle.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            progress(tensors[name].nbytes)
        handle.flush()
        os.fsync(handle.fileno())


def compare_tensors(
    file: Path,
    tensors: Mapping[str, Pending],
    progress: Callable[[int], object] = lambda nbytes: None,
) -> None:
    """Read a file that `write_tensors` wrote and compare it bit for bit, one tensor at a time.

    Raises:
        OutputError: it is not what was written.
    """
    try:
        entries, _ = read_header(file)
        wrong = sorted(entries.keys() ^ tensors.keys())
        for name in () if wrong else tensors:
            wanted = tensors[name].make().detach().cpu()
            read = entries[name].read()
            same = (
                read.dtype == wanted.dtype
                and read.shape == wanted.shape
                and torch.equal(_bits(read), _bits(wanted))
            )
            wrong += [] if same else [name]
            progress(tensors[name].nbytes)
    except ModelError as error:
        raise OutputError(
            f"{file} can't be read back: {error.got}",
            "what was written",
            "check the disk and try again",
        ) from None
    if wrong:
        raise OutputError(
            f"{file} is not what was written, for example {wrong[0]}",
            "the same bits",
            "check the disk and try again",
        )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else tensor


def _read_into(target: memoryview, span: Span) -> None:
    try:
        with span.file.open("rb", buffering=0) as handle:
            handle.seek(span.start)
            done = 0
            while done < span.size:  # one read gives at most 2 GB
                count = handle.readinto(target[done:])
                if not count:
                    raise _damaged(span.file, f"it ends at byte {span.start + done}")
                done += count
    except OSError as error:
        raise _damaged(span.file, str(error.strerror or error)) from None


def _parsed_header(file: Path) -> tuple[dict[str, dict], int]:
    raw = header_bytes(file)
    with contextlib.suppress(ValueError):
        header = json.loads(raw)
        if isinstance(header, dict):
            return header, 8 + len(raw)
    raise _damaged(file, "its header is not JSON")


def _entry(file: Path, facts: dict, begin: int) -> Entry:
    dtype, shape = DTYPES[facts["dtype"]], tuple(int(size) for size in facts["shape"])
    first, last = facts["data_offsets"]
    if min(shape, default=0) < 0 or first < 0 or last - first != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{facts}")
    return Entry(dtype, shape, (Span(file, begin + first, last - first),))


def _indexed_files(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise _damaged(index, f"it is not an index: {error}") from None
    files = [index.parent / name for name in names]
    for name, file in zip(names, files, strict=True):
        if Path(name).name != name or not file.is_file():
            raise ModelError(
                f"{index.parent} lacks the file {name}",
                f"the {len(names)} files that {index.name} names",
                "download it again",
            )
    return files


def _damaged(file: Path, reason: str) -> ModelError:
    return ModelError(
        f"{file} is damaged or no safetensors file: {reason}",
        "a whole safetensors file",
        "download it again",
    )
