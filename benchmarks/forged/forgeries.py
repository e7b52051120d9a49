"""Ways to forge a file: each takes its bytes and a source of chance and gives other bytes."""

import json
import random
import re
import struct
import zlib
from collections.abc import Callable

Forgery = Callable[[bytes, random.Random], bytes]

NUMBERS = (
    b"-1",
    b"0",
    b"1e400",
    b"-1e400",
    b"NaN",
    b"Infinity",
    b"9" * 30,
    b"9" * 6000,
    b"-9223372036854775809",
    b"4294967296",
)
WORDS = (0, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)


def flip(data: bytes, chance: random.Random) -> bytes:
    forged = bytearray(data)
    for _ in range(chance.randint(1, 8)):
        forged[chance.randrange(len(forged))] ^= 1 << chance.randrange(8)
    return bytes(forged)


def cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def overwrite(data: bytes, chance: random.Random) -> bytes:
    at, length = chance.randrange(len(data)), chance.randint(1, 32)
    new = chance.choice([bytes(length), b"\xff" * length, chance.randbytes(length)])
    return data[:at] + new[: len(data) - at] + data[at + length :]


def swap(data: bytes, chance: random.Random) -> bytes:
    ends = sorted(chance.randrange(len(data) + 1) for _ in range(4))
    a, b, c, d = ends
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def repeat(data: bytes, chance: random.Random) -> bytes:
    a, b = sorted(chance.randrange(len(data) + 1) for _ in range(2))
    return data[:b] + data[a:b] * chance.choice([1, 2, 50]) + data[b:]


def word(data: bytes, chance: random.Random) -> bytes:
    """A huge or negative number in the place of one of 4 or 8 bytes, near the beginning mostly."""
    size, order = chance.choice([4, 8]), chance.choice(["<", ">"])
    end = max(1, min(len(data) - size, chance.choice([32, 256, 4096, len(data)])))
    at = chance.randrange(end)
    value = chance.choice(WORDS) % 2 ** (8 * size)
    packed = struct.pack(f"{order}{'I' if size == 4 else 'Q'}", value)
    return data[:at] + packed + data[at + size :]


def number(data: bytes, chance: random.Random) -> bytes:
    """Another text in the place of a number."""
    places = list(re.finditer(rb"-?\d+(\.\d+)?([eE][-+]?\d+)?", data))
    if not places:
        return flip(data, chance)
    place = chance.choice(places)
    return data[: place.start()] + chance.choice(NUMBERS) + data[place.end() :]


def nest(data: bytes, chance: random.Random) -> bytes:
    opened = chance.choice([b"[", b'{"a":', b"- ", b"[{"])
    at = chance.choice([0, *(m.start() for m in re.finditer(rb"[\[{:,]\s*", data[:100_000]))])
    return data[:at] + opened * chance.choice([70, 5000, 200_000]) + data[at:]


def double_key(data: bytes, chance: random.Random) -> bytes:
    keys = list(re.finditer(rb'"[\w.]+":\s*[^,\[{}\]]+,', data))
    if not keys:
        return repeat(data, chance)
    key = chance.choice(keys)
    return data[: key.end()] + key[0] + data[key.end() :]


def many_values(data: bytes, chance: random.Random) -> bytes:
    return data.rstrip()[:-1] + b"," + b"[]," * 3_000_000 + b"[]" + data.rstrip()[-1:]


def aliases(data: bytes, chance: random.Random) -> bytes:
    lines = [b"a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [b"a%d: &a%d [%s]" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 10)) for i in range(1, 9)]
    kind = chance.randrange(3)
    if kind == 1:
        lines = [b"a0: &a0 [*a0]"]
    if kind == 2:
        lines = [b"a0: &a0 {b: 1}"] + [
            b"a%d: &a%d {<<: *a%d, c%d: *a%d}" % (i, i, i - 1, i, i - 1) for i in range(1, 60)
        ]
    return b"\n".join(lines) + b"\n" + data


def safetensors_header(data: bytes, chance: random.Random) -> bytes:
    """Offsets that overlap or lie outside, other shapes and types, names that stand twice."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    one, other = chance.choice(names), chance.choice(names)
    entry = header[one]
    kind = chance.randrange(6)
    if kind == 0:
        entry["data_offsets"] = header[other]["data_offsets"]
    elif kind == 1:
        shift = chance.choice([-8, 4, 2**40, -(2**40), 2**64])
        entry["data_offsets"] = [place + shift for place in entry["data_offsets"]]
    elif kind == 2:
        entry["shape"] = chance.choice([[2**62, 4], [-1], [2**31, 2**31], [0], [1] * 5000, [1.5]])
    elif kind == 3:
        entry["dtype"] = chance.choice(["F64", "U8", "I8", "BOOL", "X9", "", None, 4])
    elif kind == 4:
        header[one] = chance.choice([None, [], 5, {}, {"dtype": "F32"}])
    raw = json.dumps(header).encode()
    if kind == 5:
        raw = raw[:-1] + b"," + json.dumps({one: entry}).encode()[1:]
    size = chance.choice([len(raw)] * 8 + [2**62, 0, len(data), 10**8])
    return size.to_bytes(8, "little") + raw + data[8 + length :]


def not_finite(data: bytes, chance: random.Random) -> bytes:
    """A NaN or an infinity of fp32 among the numbers of a safetensors file."""
    start = 8 + int.from_bytes(data[:8], "little")
    at = start + 4 * chance.randrange((len(data) - start) // 4)
    value = chance.choice([0x7FC00000, 0x7F800000, 0xFF800000])
    return data[:at] + struct.pack("<I", value) + data[at + 4 :]


def png_size(data: bytes, chance: random.Random) -> bytes:
    """Another size in the header, with a right checksum."""
    sizes = (0, 1, 20_000, 2**31 - 1, 2**32 - 1)
    head = (
        data[12:16] + struct.pack(">II", chance.choice(sizes), chance.choice(sizes)) + data[24:29]
    )
    return data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:]


def jpeg_size(data: bytes, chance: random.Random) -> bytes:
    at = data.find(b"\xff\xc0")
    size = struct.pack(">HH", chance.choice([0, 65535]), chance.choice([1, 65535]))
    return data[: at + 5] + size + data[at + 9 :]


BYTES: tuple[Forgery, ...] = (flip, cut, overwrite, swap, repeat, word)
TEXT: tuple[Forgery, ...] = (flip, cut, overwrite, swap, repeat, number, nest)
JSON: tuple[Forgery, ...] = (*TEXT, double_key, many_values)
YAML: tuple[Forgery, ...] = (*TEXT, aliases)
SAFETENSORS: tuple[Forgery, ...] = (*BYTES, safetensors_header, safetensors_header, not_finite)
