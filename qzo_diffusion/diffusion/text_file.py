"""Decode text of unknown encoding, and find text that no tokenizer can read."""

import codecs
import unicodedata

_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark is its beginning
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_WHITE = "\t\n\r\f\v"


def decode(data: bytes) -> tuple[str, str | None]:
    """Return the text, and the name of its encoding if that is not UTF-8.

    Without a mark, UTF-8 is tried first. Bytes that would be control characters in it are read as
    UTF-16, but for a few in a text that is UTF-8 otherwise: UTF-16 has a NUL beside every letter.
    """
    for mark, encoding in _MARKS.items():
        if data.startswith(mark):
            name = None if encoding == "utf-8-sig" else encoding.upper()
            return data.decode(encoding, errors="replace"), name
    text, name = _of_single_bytes(data)
    controls = sum(map(_is_control, text))
    strays = name is None and 3 * controls < len(text)
    if controls and not strays and (wide := _utf_16(data)) is not None:
        return wide, "UTF-16 without a mark"
    return text, name


def split_lines(text: str) -> list[str]:
    """Split at LF, CR LF and CR only.

    `str.splitlines` also splits at form feeds, U+0085 and U+2028, which may stand in a text.
    """
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _of_single_bytes(data: bytes) -> tuple[str, str | None]:
    for encoding, name in (("utf-8", None), ("cp1252", "Windows-1252")):
        try:
            return data.decode(encoding), name
        except UnicodeDecodeError:
            continue
    return data.decode("latin-1"), "Latin-1"


def _utf_16(data: bytes) -> str | None:
    """Decode by the byte order that gives characters of fewer Unicode blocks; None if neither is
    readable.
    """
    found = []
    for encoding in ("utf-16-le", "utf-16-be"):
        try:
            text = data[: len(data) // 2 * 2].decode(encoding)
        except UnicodeDecodeError:
            continue
        if not has_controls(text) and all(unicodedata.category(c) not in "CnCo" for c in text):
            found.append((len({ord(character) >> 8 for character in text}), text))
    return min(found)[1] if found else None


def has_controls(text: str) -> bool:
    """Return whether a text holds NUL or other control characters apart from white space."""
    return any(map(_is_control, text))


def _is_control(character: str) -> bool:
    return character < " " and character not in _WHITE
