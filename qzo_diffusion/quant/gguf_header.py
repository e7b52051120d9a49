"""The header of a GGUF file, checked against the file before another program reads it.

The package gguf makes several objects for each element of each array, and believes every length.
Here lengths and counts are compared with what is left of the file, names may not repeat, and each
tensor lies inside the file with no other in its bytes.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.quant.describe import described
from qzo_diffusion.system.reading import unique

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# struct's letter of each type of value but strings and arrays
NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
STRING, ARRAY = 8, 9
LONGEST_NAME, LONGEST_STRING = 2**12, 2**24  # bytes; a chat template is a string
# Elements of all arrays: a vocabulary of 260,000 words has 1.3 million, in a file of 250 MB.
ALWAYS, OF_THE_FILE = 600_000, 128
MOST_DIMENSIONS, MOST_TENSORS, MOST_KEYS = 4, 2**17, 2**14
KEPT = ("general.architecture", "general.alignment", "split.count", "split.no")
DEFAULT_ALIGNMENT = 32
SPLIT = "merge its parts into one file: llama-gguf-split --merge FIRST_PART.gguf WHOLE.gguf"


@dataclass(frozen=True)
class GgufTensor:
    """kind: ggml's number of its type. offset: from the beginning of the data."""

    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class GgufHeader:
    """values: those of the keys that are KEPT. data: byte at which the tensors begin."""

    values: dict[str, Any]
    tensors: dict[str, GgufTensor]
    data: int


def has_magic(file: Path) -> bool:
    """Return whether a file begins like a GGUF file."""
    try:
        with file.open("rb") as handle:
            return handle.read(4) == MAGIC
    except OSError:
        return False


def is_gguf(place: Path) -> bool:
    """Return whether a path is a GGUF file, by its ending in any case, or by its first bytes: a
    link may have another ending.
    """
    return place.is_file() and (place.suffix.lower() == ".gguf" or has_magic(place))


def check_whole(file: Path, header: GgufHeader) -> None:
    """Raises ModelError for a file that is one part of several."""
    parts, part = header.values.get("split.count", 1), header.values.get("split.no", 0)
    if isinstance(parts, int) and isinstance(part, int) and parts > 1:
        raise ModelError(f"{file} is part {part + 1} of {parts}", "a file with all tensors", SPLIT)


def read_gguf_header(file: Path) -> GgufHeader:
    """Raises ModelError for a file that is no GGUF file, or whose header can't be true."""
    if not has_magic(file):
        kind = described(file)
        raise _damaged(file, f"it is {kind.name}" if kind else "it does not begin as one")
    try:
        with file.open("rb") as handle:
            return _Reader(handle, file.stat().st_size).header()
    except (ValueError, struct.error, OverflowError) as error:
        raise _damaged(file, str(error)) from None
    except OSError as error:
        raise _damaged(file, str(error.strerror or error)) from None


class _Reader:
    """Reads little-endian numbers and knows how much of the file is left."""

    def __init__(self, handle: BinaryIO, size: int) -> None:
        self._handle, self._size = handle, size
        self._elements = max(ALWAYS, size // OF_THE_FILE)

    def header(self) -> GgufHeader:
        self._handle.seek(len(MAGIC))
        if (version := self._number("I")) not in VERSIONS:
            raise ValueError(f"version {version}, or another byte order")
        tensors, keys = self._number("Q"), self._number("Q")
        if tensors > min(MOST_TENSORS, self._left() // 24) or keys > min(
            MOST_KEYS, self._left() // 13
        ):
            raise ValueError(f"{tensors} tensors and {keys} keys in {self._size} bytes")
        values = unique(self._pair() for _ in range(keys))
        found = unique(self._tensor() for _ in range(tensors))
        alignment = values.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= 2**20:
            raise ValueError(f"general.alignment = {alignment}")
        data = -(-self._handle.tell() // alignment) * alignment
        _check_places(found, self._size - data, alignment)
        return GgufHeader({key: values[key] for key in KEPT if key in values}, found, data)

    def _left(self) -> int:
        return self._size - self._handle.tell()

    def _bytes(self, count: int, most: int) -> bytes:
        if count > min(most, self._left()):
            raise ValueError(f"{count} bytes at byte {self._handle.tell()} of {self._size}")
        return self._handle.read(count)

    def _number(self, letter: str) -> Any:
        return struct.unpack(f"<{letter}", self._bytes(struct.calcsize(f"<{letter}"), 8))[0]

    def _string(self, most: int) -> str:
        return self._bytes(self._number("Q"), most).decode("utf-8", "replace")

    def _pair(self) -> tuple[str, Any]:
        name = self._string(LONGEST_NAME)
        return name, self._value(self._number("I"))

    def _value(self, kind: int) -> Any:
        """The value; of an array only that its elements are there."""
        if kind == STRING:
            return self._string(LONGEST_STRING)
        if kind == ARRAY:
            return self._skip_array()
        if kind not in NUMBERS:
            raise ValueError(f"a value of type {kind}")
        return self._number(NUMBERS[kind])

    def _skip_array(self) -> None:
        kind, count = self._number("I"), self._number("Q")
        self._elements -= count
        if self._elements < 0:
            raise ValueError(f"arrays of too many elements, one of {count}")
        if kind == STRING:
            for _ in range(count):
                self._bytes(self._number("Q"), LONGEST_STRING)
        elif kind in NUMBERS:
            size = struct.calcsize(f"<{NUMBERS[kind]}") * count
            if size > self._left():
                raise ValueError(f"an array of {size} bytes at byte {self._handle.tell()}")
            self._handle.seek(size, 1)
        else:
            raise ValueError(f"an array of type {kind}")

    def _tensor(self) -> tuple[str, GgufTensor]:
        name, dimensions = self._string(LONGEST_NAME), self._number("I")
        if not 0 < dimensions <= MOST_DIMENSIONS:
            raise ValueError(f"{name} of {dimensions} dimensions")
        shape = tuple(self._number("Q") for _ in range(dimensions))
        return name, GgufTensor(shape, self._number("I"), self._number("Q"))


def _check_places(tensors: dict[str, GgufTensor], size: int, alignment: int) -> None:
    end = 0
    for name, one in sorted(tensors.items(), key=lambda item: item[1].offset):
        length = _length(name, one)
        if one.offset % alignment or one.offset < end or one.offset + length > size:
            raise ValueError(f"{name} at byte {one.offset} of {size}, beyond its place")
        end = one.offset + length


def _length(name: str, tensor: GgufTensor) -> int:
    from qzo_diffusion.quant.gguf import need_package

    sizes = {int(kind): size for kind, size in need_package().GGML_QUANT_SIZES.items()}
    if tensor.kind not in sizes:
        raise ValueError(f"{name} of type {tensor.kind}")
    block, of_block = sizes[tensor.kind]
    if tensor.shape[0] % block or not all(tensor.shape):
        raise ValueError(f"{name} of the shape {tensor.shape}, in blocks of {block}")
    return math.prod(tensor.shape) // block * of_block


def _damaged(file: Path, reason: str) -> ModelError:
    return ModelError(
        f"{file} is damaged or no GGUF file: {reason}", "a whole GGUF file", "download it again"
    )
