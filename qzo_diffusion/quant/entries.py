"""A tensor as it lies on disk: where its bytes are, and the scale that they are multiplied by.

`safe_open` maps a file, and its mapped pages count as memory of the process for as long as any of
its tensors lives (reading 640 MB raised it by 615). Here plain reads fetch one tensor at a time.
"""

import math
import mmap
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.quant import gguf

# fmt: off
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}
# fmt: on
RARE = {
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
}  # read and never written
if hasattr(torch, "float8_e8m0fnu"):  # from torch 2.7 on
    RARE["F8_E8M0"] = torch.float8_e8m0fnu
NAMES = {dtype: name for name, dtype in DTYPES.items()}
OWN_PAGES = 2**12  # bytes, from which a tensor gets pages of its own
HUGE = 2**23  # bytes, from which they are large pages


@dataclass(frozen=True)
class Span:
    """Neighbouring bytes of a file."""

    file: Path
    start: int
    size: int


@dataclass(frozen=True)
class Entry:
    """A tensor on disk; its bytes are those of its spans, one after the other.

    scale: what the stored numbers are multiplied by. lacks_scale: they look as if a scale belonged
    to them, and there is none. crc32: of the bytes, where it is known. blocks: of a GGUF file,
    ggml's name of the type of blocks that the bytes are; the dtype is then uint8, and the shape the
    weight's. rotation: of codes of SDNQ, the longest run of inputs that is rotated, 0 for none."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    spans: tuple[Span, ...]
    scale: "Scale | None" = None
    lacks_scale: bool = False
    crc32: int | None = None
    blocks: str | None = None
    rotation: int | None = None

    @property
    def nbytes(self) -> int:
        return sum(span.size for span in self.spans)

    def rows(self, start: int, stop: int) -> "Entry":
        """Rows start .. stop-1 of a tensor of one span."""
        (span,) = self.spans
        of_a_row = span.size // self.shape[0]
        part = replace(span, start=span.start + start * of_a_row, size=(stop - start) * of_a_row)
        scale = None if self.scale is None else self.scale.of_rows(start, stop)
        shape = (stop - start, *self.shape[1:])
        return replace(self, shape=shape, spans=(part,), scale=scale, crc32=None)

    def read(self) -> Tensor:
        """The tensor on the CPU; fp32 where it has a scale or is in blocks.

        Raises ModelError when the file ends before it, its bytes are not those that were written,
        or a number is not finite.
        """
        if self.blocks is None:
            return self._read(self.shape)
        found = gguf.dequantized(self.read_blocks(), self.blocks).view(self.shape)
        if not all_finite(found):
            raise damaged(self.spans[0].file, "a number in it is not finite")
        return found

    def read_blocks(self) -> Tensor:
        """The bytes of a weight in blocks, uint8 [N, bytes of a row]. Raises ModelError."""
        return self._read((self.shape[0], self.nbytes // self.shape[0]))

    def _read(self, shape: tuple[int, ...]) -> Tensor:
        tensor = empty_pages(shape, self.dtype)
        whole = target = bytes_of(tensor)
        for span in self.spans:
            _read_into(target[: span.size], span)
            target = target[span.size :]
        if self.crc32 is not None and zlib.crc32(whole) != self.crc32:
            raise damaged(self.spans[0].file, "its bytes have changed")
        found = tensor if self.scale is None else self.scale.times(tensor)
        if not all_finite(found):
            file = self.spans[0].file if self.spans else "a file"
            raise damaged(file, "a number in it is not finite")
        return found


def all_finite(tensor: Tensor) -> bool:
    """Return whether all numbers are finite, in one pass over their extremes. Bytes are skipped."""
    if not tensor.is_floating_point() or tensor.element_size() == 1 or not tensor.numel():
        return True
    return all(math.isfinite(extreme.item()) for extreme in tensor.aminmax())


@dataclass(frozen=True)
class Scale:
    """A scale for each block of a weight.

    entry: numbers [A, B], or as many in another shape. block: rows and columns of the weight that
    share one. rows: ranges of the whole weight's rows that it is for, in order."""

    entry: Entry
    counts: tuple[int, int]
    block: tuple[int, int]
    rows: tuple[tuple[int, int], ...]

    def of_rows(self, start: int, stop: int) -> "Scale":
        ((first, _),) = self.rows
        return replace(self, rows=((first + start, first + stop),))

    def times(self, codes: Tensor) -> Tensor:
        """codes [N, ...] -> their product with the scales, fp32 of the same shape.

        Raises ModelError for a scale that is not finite.
        """
        scales = self.entry.read().float().reshape(self.counts)
        if not scales.isfinite().all():
            file = self.entry.spans[0].file if self.entry.spans else "a file"
            raise damaged(file, "a scale in it is not finite")
        wide = codes.float()
        if self.counts == (1, 1):
            return wide.mul_(scales.item())
        rows = torch.cat([torch.arange(start, stop) for start, stop in self.rows])
        of_rows = scales[rows // self.block[0]]
        flat = wide.view(len(rows), -1)
        for column in range(self.counts[1]):
            columns = slice(column * self.block[1], (column + 1) * self.block[1])
            flat[:, columns].mul_(of_rows[:, column : column + 1])
        return wide


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    if not tensor.numel():
        return memoryview(b"")
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def joined(parts: Sequence[Entry]) -> Entry:
    """The rows of all parts of one tensor, one after the other."""
    first = parts[0]
    scale = first.scale
    if scale is not None:
        ranges = tuple(rows for part in parts if part.scale for rows in part.scale.rows)
        scale = replace(scale, rows=ranges)
    return replace(
        first,
        shape=(sum(part.shape[0] for part in parts), *first.shape[1:]),
        spans=tuple(span for part in parts for span in part.spans),
        scale=scale,
    )


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


def damaged(file: Path | str, reason: str) -> ModelError:
    return ModelError(
        f"{file} is damaged or no safetensors file: {reason}",
        "a whole safetensors file",
        "download it again",
    )


def _read_into(target: memoryview, span: Span) -> None:
    try:
        with span.file.open("rb", buffering=0) as handle:
            handle.seek(span.start)
            done = 0
            while done < span.size:  # one read gives at most 2 GB
                count = handle.readinto(target[done:])
                if not count:
                    raise damaged(span.file, f"it ends at byte {span.start + done}")
                done += count
    except OSError as error:
        raise damaged(span.file, str(error.strerror or error)) from None
