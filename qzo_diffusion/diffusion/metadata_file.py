"""metadata.jsonl: one caption a line, `{"file_name": "a.png", "text": "a cat"}`."""

import posixpath
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath

from qzo_diffusion.core.errors import DataError
from qzo_diffusion.resources import is_unicode
from qzo_diffusion.system.reading import parse_json

_EXPECTED_LINE = 'one JSON object a line, such as {"file_name": "a.png", "text": "a cat"}'


def metadata_lines(path: Path, text: str) -> Iterator[tuple[str, str, str]]:
    """Yield the place, the file name and the caption of each line of `text`.

    Raises:
        DataError: a line is wrong.
    """
    # Only a line feed ends a line. str.splitlines also splits at characters that JSON allows inside
    # a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            name, caption = _parse_line(line, where)
            yield where, _inside(name, where), caption


def line_error(where: str, problem: str) -> DataError:
    return DataError(f"{where}: {problem}", _EXPECTED_LINE, "correct that line, or remove it")


def shown(name: str) -> str:
    return repr(name if len(name) <= 80 else name[:77] + "...")


def _parse_line(line: str, where: str) -> tuple[str, str]:
    try:
        entry = parse_json(line)
    except ValueError as error:
        raise line_error(where, f"not JSON ({error})") from error
    if not isinstance(entry, dict):
        raise line_error(where, f"a JSON {type(entry).__name__}, not an object")
    for key in ("file_name", "text"):
        if key not in entry:
            raise line_error(where, f'no key "{key}"')
        if not isinstance(entry[key], str):
            raise line_error(where, f'"{key}" is a {type(entry[key]).__name__}, not a string')
    # JSON allows it, but no tokenizer and no file in UTF-8 can take it.
    if not is_unicode(entry["text"]):
        raise line_error(where, '"text" holds half of a Unicode surrogate pair')
    return entry["file_name"], entry["text"]


def _inside(name: str, where: str) -> str:
    """Return a name without "." and "..".

    Raises:
        DataError: the name leads out of the folder of metadata.jsonl.
    """
    normal = posixpath.normpath(name)
    if normal.startswith("/") or PureWindowsPath(name).drive or normal.split("/")[0] == "..":
        raise line_error(where, f"{shown(name)} leads out of the folder")
    return normal
