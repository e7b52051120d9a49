"""JSON that may come from anyone; YAML is read by `strict_yaml`.

A parser turns a short text into far more memory: `[]` is 2 bytes in a file and 64 in Python, and a
deep nesting ends the interpreter's stack. Size, number of values and nesting are checked on the
text, before a parser sees it.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

MOST_BYTES = 2**26  # of a JSON file; the rows of 100,000 pictures take 50 MB
MOST_VALUES = 2_000_000  # about 64 bytes each, with what they hold
MOST_NESTED = 64
LONGEST_LINE = 2**20
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)  # one without an end goes to the end


class TooMuch(ValueError):
    """A text beyond a limit; the message says which."""


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """The whole file. Raises OSError, and TooMuch where it is larger than `most` bytes."""
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise TooMuch(f"more than {most} bytes")
    return data


def read_json(path: Path, most: int = MOST_BYTES) -> Any:
    """Raises OSError, and ValueError for what is no JSON, or beyond a limit."""
    return parse_json(read_bytes(path, most))


def parse_json(data: bytes | str) -> Any:
    """Raises ValueError for what is no JSON, has a key twice, or is beyond a limit."""
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    bare = _STRING.sub(b"", raw)
    count = bare.count(b",") + bare.count(b"[") + bare.count(b"{")
    if count > MOST_VALUES:
        raise TooMuch(f"{count} values, where at most {MOST_VALUES} are read")
    _check_nesting(bare)
    return json.loads(raw, object_pairs_hook=unique)


def read_json_lines(path: Path, most: int = 2**30) -> Iterator[bytes]:
    """The whole lines of a file that another process may just be writing to, as they are.

    Raises OSError, and TooMuch for a file or a line beyond a limit.
    """
    if path.stat().st_size > most:
        raise TooMuch(f"more than {most} bytes")
    with path.open("rb") as file:
        while line := file.readline(LONGEST_LINE + 1):
            if len(line) > LONGEST_LINE:
                raise TooMuch(f"a line of more than {LONGEST_LINE} bytes")
            if line.endswith(b"\n"):
                yield line


def _check_nesting(bare: bytes) -> None:
    depth = 0
    for character in re.findall(rb"[\[\]{}]", bare):
        depth += 1 if character in b"[{" else -1
        if depth > MOST_NESTED:
            raise TooMuch(f"nested deeper than {MOST_NESTED} levels")


def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs as a mapping. Raises ValueError for a key that stands twice."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name!r} stands twice")
        found[name] = value
    return found
