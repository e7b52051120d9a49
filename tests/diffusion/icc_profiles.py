"""Small colour profiles, built from the specification ICC.1:2001."""

import struct
from collections.abc import Mapping

D50 = (0.9642, 1.0, 0.8249)
# Red, green and blue as XYZ under D50.
ADOBE_RGB = ((0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446))
WIDE_GAMUT = ((0.7161, 0.2582, 0.0), (0.1010, 0.7250, 0.0518), (0.1471, 0.0169, 0.7734))


def rgb_profile(primaries: tuple[tuple[float, ...], ...], gamma: float) -> bytes:
    tags = {f"{letter}XYZ": _xyz(value) for letter, value in zip("rgb", primaries, strict=True)}
    return _profile("RGB ", "XYZ ", tags | {f"{letter}TRC": _curve(gamma) for letter in "rgb"})


def grey_profile(gamma: float) -> bytes:
    return _profile("GRAY", "XYZ ", {"kTRC": _curve(gamma)})


def cmyk_profile() -> bytes:
    """Paper is white, whatever holds black is black, any other ink is mid grey."""
    straight = bytes(range(256))
    corners = [(255, 128, 128), *[(0, 128, 128), (128, 128, 128)] * 7, (0, 128, 128)]
    matrix = struct.pack(">9i", *(65536 * (index % 4 == 0) for index in range(9)))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + straight * 4
    return _profile("CMYK", "Lab ", {"A2B0": table + bytes(sum(corners, ())) + straight * 3})


def _profile(space: str, connection: str, tags: Mapping[str, bytes]) -> bytes:
    every = {"desc": _description("a test"), "wtpt": _xyz(D50), **tags}
    body, table = b"", struct.pack(">I", len(every))
    for name, data in every.items():
        start = 128 + 4 + 12 * len(every) + len(body)
        table += struct.pack(">4sII", name.encode(), start, len(data))
        body += data + bytes(-len(data) % 4)
    fields = (
        128 + len(table) + len(body),
        0,
        0x02400000,
        b"mntr" if space != "CMYK" else b"prtr",
        space.encode(),
        connection.encode(),
    )
    header = struct.pack(">III4s4s4s12x4s28x3i", *fields, b"acsp", *map(_fixed, D50))
    return header.ljust(128, b"\0") + table + body


def _fixed(value: float) -> int:
    return round(value * 65536)


def _xyz(value: tuple[float, ...]) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *map(_fixed, value))


def _curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


def _description(text: str) -> bytes:
    data = text.encode() + b"\0"
    return b"desc\0\0\0\0" + struct.pack(">I", len(data)) + data + bytes(78)
