"""The append-only log of a run: seeds and scalars, from which every step can be rebuilt bit for
bit.

    file    = MAGIC, record of the header, record, record, ...
    record  = kind u8, version u8, length u16, guard u32, payload, chain (8 bytes)
              little-endian throughout
    guard   = crc32 of the first four bytes, seeded by the chain before: a damaged length is
              found before it is believed
    chain   = blake2b-64 of (chain of the record before, everything of this record before the chain)

A record counts when its chain is right. Each chain holds the one before, so a flipped bit, a
swapped, doubled or missing record anywhere is found and named. A file that ends inside a record was
cut by a crash: that tail is left out and reported. A step takes
52 + 8 · directions · patch groups bytes. Where examples have their own directions, the header's
`examples` is the number of all directions of a step.
"""

import hashlib
import json
import math
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qzo_diffusion.core.errors import JournalError

MAGIC = b"QZOJRNL1"
VERSION = 1
HEADER, _STEP, _SKIPPED, _RESUME = 1, 2, 3, 5
_NOTES = {"resume": _RESUME}
_PREFIX = struct.Struct("<BBH")
_GUARD = struct.Struct("<I")
_STEP_PAYLOAD = struct.Struct("<IQddd")
CHAIN_BYTES = 8
_OVERHEAD = _PREFIX.size + _GUARD.size + CHAIN_BYTES
MOST_SCALARS = (2**16 - 1 - _STEP_PAYLOAD.size) // 8  # of a step: directions times patch groups


@dataclass(frozen=True)
class StepEntry:
    """A step that was done. A skipped one (NaN or infinite loss) is counted but changed nothing."""

    step: int
    seed: int
    lr: float
    eps: float
    loss: float
    projected_grad: tuple[float, ...]
    skipped: bool = False


@dataclass(frozen=True)
class NoteEntry:
    """An entry that is no step: its kind ("resume") and its facts."""

    kind: str
    content: Mapping[str, Any]


Entry = StepEntry | NoteEntry


def pack(kind: int, payload: bytes, chain: bytes) -> bytes:
    prefix = _PREFIX.pack(kind, VERSION, len(payload))
    body = prefix + _GUARD.pack(zlib.crc32(prefix, zlib.crc32(chain))) + payload
    return body + hashlib.blake2b(chain + body, digest_size=CHAIN_BYTES).digest()


def records(data: bytes, path: Path) -> Iterator[tuple[int, bytes, bytes, int]]:
    """(kind, payload, chain, end) of every whole record; stops before a torn tail."""
    position, chain, count = len(MAGIC), b"", 0
    while len(data) - position >= _PREFIX.size + _GUARD.size:
        prefix = data[position : position + _PREFIX.size]
        kind, version, length = _PREFIX.unpack(prefix)
        (guard,) = _GUARD.unpack_from(data, position + _PREFIX.size)
        if guard != zlib.crc32(prefix, zlib.crc32(chain)):
            raise _damaged(path, count, position)
        end = position + _OVERHEAD + length
        if end > len(data):
            return
        if version > VERSION:
            raise JournalError(
                f"{path} has records of format {version}",
                f"format {VERSION}",
                "use the version that wrote it",
            )
        body, stored = data[position : end - CHAIN_BYTES], data[end - CHAIN_BYTES : end]
        if stored != hashlib.blake2b(chain + body, digest_size=CHAIN_BYTES).digest():
            raise _damaged(path, count, position)
        yield kind, body[_PREFIX.size + _GUARD.size :], stored, end
        position, chain, count = end, stored, count + 1


def encode(entry: Entry) -> tuple[int, bytes]:
    if isinstance(entry, NoteEntry):
        return _NOTES[entry.kind], to_json(entry.content)
    if len(entry.projected_grad) > MOST_SCALARS:
        raise JournalError(
            f"a step of {len(entry.projected_grad)} scalars",
            f"at most {MOST_SCALARS}, the room in a record",
            "try fewer directions or patch groups",
        )
    payload = _STEP_PAYLOAD.pack(entry.step, entry.seed, entry.lr, entry.eps, entry.loss)
    payload += struct.pack(f"<{len(entry.projected_grad)}d", *entry.projected_grad)
    return (_SKIPPED if entry.skipped else _STEP), payload


def decode(kind: int, payload: bytes, index: int, path: Path) -> Entry:
    for name, number in _NOTES.items():
        if kind == number:
            return NoteEntry(name, _from_json(payload, f"record {index + 1}", path))
    if kind not in (_STEP, _SKIPPED) or (len(payload) - _STEP_PAYLOAD.size) % 8:
        raise JournalError(
            f"{path}: record {index + 1} of an unknown kind {kind}",
            "a step or a note",
            "use the version that wrote it",
        )
    step, seed, lr, eps, loss = _STEP_PAYLOAD.unpack_from(payload)
    grads = struct.unpack(
        f"<{(len(payload) - _STEP_PAYLOAD.size) // 8}d", payload[_STEP_PAYLOAD.size :]
    )
    if kind == _STEP and not (grads and all(map(math.isfinite, (lr, eps, *grads)))):
        raise JournalError(
            f"{path}: step {step}, with a rate, radius or derivative that is not finite, or none",
            "finite numbers: a step without them changes nothing and is marked as skipped",
            "give the run's own journal",
        )
    return StepEntry(step, seed, lr, eps, loss, grads, skipped=kind == _SKIPPED)


def decode_header(kind: int, payload: bytes, path: Path) -> Mapping[str, Any]:
    if kind != HEADER:
        raise JournalError(
            f"{path} has no header", "a header as the first record", "give journal.qzo of a run"
        )
    return _from_json(payload, "the header", path)


def _from_json(payload: bytes, name: str, path: Path) -> Mapping[str, Any]:
    """A payload of at most 64 kB, so that its size needs no check."""
    try:
        content = json.loads(payload)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
    except (ValueError, RecursionError) as error:
        raise JournalError(
            f"{path}: {name} can't be read: {error}", "facts by name", "give the run's own journal"
        ) from None
    return content


def to_json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(content), sort_keys=True, ensure_ascii=False).encode()


def _damaged(path: Path, index: int, position: int) -> JournalError:
    name = "the header" if index == 0 else f"record {index}"
    return JournalError(
        f"{path} is damaged in {name}, at byte {position}",
        "a journal whose checksums are right",
        "restore the file; the run's checkpoints and its result can still be sampled and exported",
    )
