"""The journal of a run: written step by step, read and checked as a whole, replayed.

`core.journal_format` says how its bytes are laid out.
"""

import contextlib
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from qzo_diffusion.core.errors import JournalError, OutputError
from qzo_diffusion.core.journal_format import (
    CHAIN_BYTES,
    HEADER,
    MAGIC,
    Entry,
    StepEntry,
    decode,
    decode_header,
    encode,
    pack,
    records,
    to_json,
)
from qzo_diffusion.core.locks import lock
from qzo_diffusion.core.noise import Distribution, directions_of_step
from qzo_diffusion.core.optimizer import Optimizer, Update
from qzo_diffusion.core.parametrization import Parametrization

FSYNC_SECONDS = 5.0
BINARY = getattr(os, "O_BINARY", 0)  # Windows would write another byte before each line end


@dataclass(frozen=True)
class Journal:
    """A verified journal. `chains[i]` is the hex chain after `entries[i]`, `sizes[i]` the file's
    size there.
    """

    header: Mapping[str, Any]
    entries: tuple[Entry, ...]
    chains: tuple[str, ...]
    sizes: tuple[int, ...]
    header_chain: str
    header_size: int
    torn_bytes: int

    @property
    def steps(self) -> list[StepEntry]:
        return [entry for entry in self.entries if isinstance(entry, StepEntry)]

    @property
    def steps_done(self) -> int:
        steps = self.steps
        return steps[-1].step + 1 if steps else 0

    @property
    def size(self) -> int:
        return self.sizes[-1] if self.sizes else self.header_size

    @property
    def chain(self) -> str:
        return self.chains[-1] if self.chains else self.header_chain

    def holds(self, chain: str) -> bool:
        """Return whether the journal once ended with this chain value."""
        return chain == self.header_chain or chain in self.chains


class JournalWriter:
    """Appends records; each is in the operating system's hands when `append` returns, and on the
    disk seconds later.

    Use `create` for a new run and `reopen` to go on with one.
    """

    def __init__(self, path: Path, chain: bytes, size: int) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_RDWR | BINARY)
        except OSError as error:
            raise _unwritable(path, error) from error
        try:
            lock(self._file)
        except OSError:
            os.close(self._file)
            raise OutputError(
                f"another process writes {path}",
                "one process a run",
                "wait for it, or stop it first",
            ) from None
        self._chain, self._size = chain, size
        self._last_sync = time.monotonic()

    @classmethod
    def create(cls, path: Path, header: Mapping[str, Any]) -> "JournalWriter":
        """Raises OutputError when there is a journal already or the place can't be written.

        Args:
            header: `directions` is the distribution of their z. Where examples have their own,
                `examples` is the number of all directions of a step.
        """
        record = pack(HEADER, to_json(header), b"")
        # so that a journal never is there without its header
        aside = path.with_name(f".{path.name}.partial")
        try:
            if path.exists():
                raise OutputError(
                    f"{path} is there already", "a new journal", "give another place, or reopen it"
                )
            with aside.open("wb") as file:
                file.write(MAGIC + record)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
            raise _unwritable(path, error) from error
        return cls(path, record[-CHAIN_BYTES:], len(MAGIC) + len(record))

    @classmethod
    def reopen(cls, path: Path) -> tuple["JournalWriter", Journal]:
        """Verify, cut a torn tail off, and go on behind the last record."""
        journal = read_journal(path)
        writer = cls(path, bytes.fromhex(journal.chain), journal.size)
        try:
            os.ftruncate(writer._file, journal.size)
        except OSError as error:
            raise _unwritable(path, error) from error
        return writer, journal

    @property
    def chain(self) -> str:
        return self._chain.hex()

    def append(self, entry: Entry) -> None:
        """Raises OutputError when the disk is full; the journal then ends with the record
        before.
        """
        kind, payload = encode(entry)
        record = pack(kind, payload, self._chain)
        try:
            written = 0
            while written < len(record):
                written += _write_at(self._file, record[written:], self._size + written)
            if time.monotonic() - self._last_sync > FSYNC_SECONDS:
                self._fsync()
        except OSError as error:
            with contextlib.suppress(OSError):
                # a read-only disk: what is behind the last record is cut off by the next resume
                os.ftruncate(self._file, self._size)
            raise _unwritable(self.path, error) from error
        self._size += len(record)
        self._chain = record[-CHAIN_BYTES:]

    def sync(self) -> None:
        """Raises OutputError when the disk does not take what was appended."""
        try:
            self._fsync()
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def close(self) -> None:
        """Raises OutputError as `sync`; the file is closed all the same."""
        if self._file < 0:
            return
        try:
            self.sync()
        finally:
            os.close(self._file)
            self._file = -1

    def _fsync(self) -> None:
        os.fsync(self._file)
        self._last_sync = time.monotonic()


def _write_at(descriptor: int, data: bytes, place: int) -> int:
    """Write at a place of a file. Returns how many bytes were taken."""
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, data, place)
    os.lseek(descriptor, place, os.SEEK_SET)  # Windows; nobody else has this descriptor
    return os.write(descriptor, data)


def read_journal(path: Path) -> Journal:
    """Read and verify the whole file.

    Raises:
        JournalError: no such file, not a journal, of a newer format, or damaged; the message names
            the record.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise JournalError(
            f"{path} can't be read: {error.strerror}",
            "the journal of a run",
            "give journal.qzo of a run",
        ) from None
    if data[: len(MAGIC)] != MAGIC:
        raise JournalError(
            f"{path} does not begin like a journal",
            "a file written by a run",
            "give journal.qzo of a run",
        )
    header: Mapping[str, Any] | None = None
    header_chain, header_size = "", 0
    entries: list[Entry] = []
    chains: list[str] = []
    sizes: list[int] = []
    end = len(MAGIC)
    for kind, payload, chain, record_end in records(data, path):
        end = record_end
        if header is None:
            header, header_chain, header_size = (
                decode_header(kind, payload, path),
                chain.hex(),
                end,
            )
            continue
        entries.append(decode(kind, payload, len(entries), path))
        chains.append(chain.hex())
        sizes.append(end)
    if header is None:
        raise JournalError(
            f"{path} ends inside its header",
            "a whole header",
            "start the run again; no step was done",
        )
    _check_order(entries, path)
    return Journal(
        header,
        tuple(entries),
        tuple(chains),
        tuple(sizes),
        header_chain,
        header_size,
        len(data) - end,
    )


def replay_(
    journal: Journal,
    parametrization: Parametrization,
    optimizer: Optimizer,
    *,
    first_step: int = 0,
    to_step: int | None = None,
) -> int:
    """Apply steps `first_step` .. `to_step - 1` again: the same update path that training takes.

    Returns the steps now done.

    Raises:
        JournalError: numbers in the header that no run writes.
    """
    _check_counts(journal)
    distribution: Distribution = journal.header["directions"]
    done = first_step
    for entry in journal.steps:
        if entry.step < first_step or (to_step is not None and entry.step >= to_step):
            continue
        if not entry.skipped:
            count = len(entry.projected_grad)
            examples = journal.header.get("examples") or count
            directions = directions_of_step(
                entry.seed, entry.step, examples, distribution, patch_groups=count // examples
            )
            optimizer.step_(parametrization, Update(directions, entry.projected_grad, entry.lr))
        done = entry.step + 1
    return done


def encoded(header: Mapping[str, Any], entries: Iterable[Entry]) -> bytes:
    """A whole journal file, chained from its header on."""
    record = pack(HEADER, to_json(header), b"")
    parts = [MAGIC, record]
    for entry in entries:
        record = pack(*encode(entry), record[-CHAIN_BYTES:])
        parts.append(record)
    return b"".join(parts)


def _check_order(entries: list[Entry], path: Path) -> None:
    steps = [entry.step for entry in entries if isinstance(entry, StepEntry)]
    if steps != list(range(len(steps))):
        raise JournalError(
            f"{path} does not count its steps from 0 without a gap",
            "steps 0, 1, 2, ...",
            "give the run's own journal",
        )


def _check_counts(journal: Journal) -> None:
    """Check the header's number of examples before directions are drawn for them."""
    known, examples = get_args(Distribution), journal.header.get("examples")
    if journal.header.get("directions") not in known:
        got, expected = f"directions {journal.header.get('directions')!r}", " or ".join(known)
    elif examples is not None and not (type(examples) is int and examples > 0):
        got, expected = f"{examples!r} examples", "a number of them, or null"
    elif wrong := [
        entry.step
        for entry in journal.steps
        if not entry.skipped and len(entry.projected_grad) % (examples or 1)
    ]:
        got = f"scalars of step {wrong[0]} that {examples} examples can't share"
        expected = "as many for each example"
    else:
        return
    raise JournalError(f"a journal with {got}", expected, "give the run's own journal")


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{path} can't be written: {error.strerror or error}",
        "a place with room for the journal",
        "free space or correct the permissions, then --resume the run; every step before this "
        "one is safe",
    )
