"""Copy picture files without texts, profiles and tags, which a picture does not need.

A decoder that fails on any of them would lose the picture.
"""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
_COLOURS = {b"tRNS", b"iCCP", b"sRGB", b"gAMA", b"eXIf"}
_JPEG_KEPT = {0xE0, 0xEE}  # JFIF, and Adobe's, which says how colours are stored
_JPEG_SCAN = 0xDA


def without_metadata(path: Path) -> Iterator[bytes]:
    """Yield copies of a PNG, JPEG or WebP file, and nothing for other formats.

    The first copy keeps colour profile and rotation if possible; the second has neither.
    """
    with path.open("rb") as file:
        start = file.read(12)
    if start.startswith((_PNG, _JPEG)) or (start[:4], start[8:]) == (b"RIFF", b"WEBP"):
        yield from _copies(path.read_bytes())


def _copies(data: bytes) -> Iterator[bytes]:
    if data.startswith(_PNG):
        yield b"".join([_PNG, *_png_chunks(data, _COLOURS)])
        yield b"".join([_PNG, *_png_chunks(data, {b"tRNS"})])
    elif data.startswith(_JPEG):
        yield b"".join([_JPEG, *_jpeg_segments(data)])
    else:
        body = b"".join(_webp_chunks(data))
        yield b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def _png_chunks(data: bytes, kept: set[bytes]) -> Iterator[bytes]:
    """Yield the chunks that a picture needs, and those of `kept` whose checksum is right."""
    at = len(_PNG)
    while at + 8 <= len(data):
        (length,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        chunk = data[at : at + 12 + length]
        whole = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        if kind[:1].isupper() or (kind in kept and whole):
            yield chunk
        at += 12 + length


def _jpeg_segments(data: bytes) -> Iterator[bytes]:
    at = len(_JPEG)
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == _JPEG_SCAN:
            break
        application = 0xE0 <= marker <= 0xEF or marker == 0xFE
        if marker in _JPEG_KEPT or not application:
            yield data[at : at + 2 + length]
        at += 2 + length
    yield data[at:]


def _webp_chunks(data: bytes) -> Iterator[bytes]:
    at = 12
    while at + 8 <= len(data):
        kind, length = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        padded = 8 + length + length % 2
        if kind not in (b"ICCP", b"EXIF", b"XMP "):
            yield data[at : at + padded]
        at += padded
