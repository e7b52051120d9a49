"""The header of a safetensors file, checked against the file before anything is allocated.

Headers may lie: lengths, counts, shapes and offsets are compared with the file's size, and names
may not repeat."""

import math
from pathlib import Path
from typing import Any

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.quant.describe import described
from qzo_diffusion.quant.entries import DTYPES, RARE, Entry, Span, damaged
from qzo_diffusion.quant.json_file import parsed_object

KNOWN = DTYPES | RARE
LONGEST = 100_000_000  # bytes, the limit of the format
# A parsed header takes up to 21 bytes for each of its own. 12 MB describe 100,000 tensors.
ALWAYS, OF_THE_FILE = 12_000_000, 25
MOST_DIMENSIONS, MOST_NUMBERS = 16, 2**62


def header_bytes(file: Path) -> bytes:
    """The raw header: changes with every name, shape, dtype and place of a tensor.

    Raises ModelError.
    """
    try:
        size = file.stat().st_size
        most = min(LONGEST, max(ALWAYS, size // OF_THE_FILE), size - 8)
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if not 0 < length <= most:
                raise _not_safetensors(file)
            return handle.read(length)
    except OSError as error:
        raise damaged(file, str(error.strerror or error)) from None


def read_header(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Return the place of each tensor in a safetensors file, and the file's metadata.

    Raises:
        ModelError: the file is missing, is not in this format, or is not as long as it says.
    """
    raw = header_bytes(file)
    try:
        header = parsed_object(raw)
        metadata = _metadata(header.pop("__metadata__", None))
        entries = {name: _entry(file, facts, 8 + len(raw)) for name, facts in header.items()}
        _check_places(list(entries.values()), 8 + len(raw), file.stat().st_size)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise damaged(file, f"its header is wrong: {error}") from None
    return entries, metadata


def _metadata(content: Any) -> dict[str, str]:
    facts = content or {}
    if not all(isinstance(value, str) for value in facts.values()):
        raise ValueError("metadata that is no text")
    return dict(facts)


def _entry(file: Path, facts: Any, begin: int) -> Entry:
    dtype, shape = KNOWN[facts["dtype"]], tuple(facts["shape"])
    first, last = facts["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, first, last)):
        raise ValueError(f"{facts}"[:200])
    if len(shape) > MOST_DIMENSIONS or math.prod(max(1, size) for size in shape) > MOST_NUMBERS:
        raise ValueError(f"a tensor of {len(shape)} dimensions, too many or too long")
    if last - first != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{facts}"[:200])
    return Entry(dtype, shape, (Span(file, begin + first, last - first),))


def _check_places(entries: list[Entry], begin: int, size: int) -> None:
    """Tensors fill the file from the header to the end, without holes, and none overlaps."""
    end = begin
    for span in sorted((entry.spans[0] for entry in entries), key=lambda s: (s.start, s.size)):
        if span.start != end:
            raise ValueError(f"tensors overlap or leave a hole at byte {min(span.start, end)}")
        end += span.size
    if end != size:
        raise ValueError(f"it has {size} bytes where its header speaks of {end}")


def _not_safetensors(file: Path) -> ModelError:
    kind = described(file)
    if kind is None:
        return damaged(file, "it has no header")
    return ModelError(f"{file} is {kind.name}", "a safetensors file", kind.remedy)
