"""Files and folders, written as a whole or not at all, and read as they were written.

A folder is written under another name, synced, marked and renamed. Its marker COMPLETE holds a hash
of every file, so damage is found when the folder is read.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from qzo_diffusion.core.errors import OutputError
from qzo_diffusion.core.locks import lock
from qzo_diffusion.system.reading import read_json

COMPLETE = "COMPLETE"
SCALES = "scales.safetensors"  # tuned scales, in final/, a checkpoint or a delta
UNFINISHED = "UNFINISHED"
WRITTEN = ("config.yaml", "final", "samples")  # names that a marker UNFINISHED may list
_PARTIAL = re.compile(r"\..+\.partial", re.DOTALL)
LARGEST_MARKER = 2**20  # bytes
ANOTHER = "choose another --output-dir"


def check_empty(path: Path, remedy: str = ANOTHER) -> None:
    """Raises OutputError when there is something at `path` already, or it can't be made there."""
    if path.exists() and (not path.is_dir() or set(os.listdir(path)) - leftovers(path)):
        raise OutputError(
            f"{path} exists and is not an empty folder",
            "a new output folder; a run is never overwritten",
            remedy,
        )
    place = existing(path)
    if not place.is_dir():
        raise unwritable(path, NotADirectoryError(errno.ENOTDIR, f"{place} is no folder"))
    if not os.access(place, os.W_OK | os.X_OK):
        raise unwritable(
            path, PermissionError(errno.EACCES, f"no permission to write into {place}")
        )


def check_new(path: Path, remedy: str = ANOTHER) -> None:
    """Check a path that `write_folder` will replace, like `check_empty`.

    The current folder is refused although it is empty: a shell in it would be left in a deleted
    folder.
    """
    check_empty(path, remedy)
    if path.is_dir() and path.samefile("."):
        raise OutputError(
            f"{path} is the current folder",
            "a folder that can be put in the place of what is there",
            remedy,
        )


def prepare_file(path: Path) -> None:
    """Make the folder that a file will be written into, before the work whose results it holds.

    Raises OutputError.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "no permission")
    except OSError as error:
        reason = error.strerror or error
        expected = "a file, in a folder that can be made and written"
        raise OutputError(
            f"{path} can't be written: {reason}", expected, "choose another --output"
        ) from None


def write_whole(path: Path, data: bytes) -> None:
    """Write to another name, sync, rename: a reader never sees half a file. Raises OutputError."""
    path = path.absolute()  # the current folder's name is empty otherwise
    aside = path.with_name(f".{path.name}.partial")
    try:
        with aside.open("wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(aside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise unwritable(path, error) from error
        raise


def write_folder(target: Path, write: Callable[[Path], None], marked: bool = True) -> Path:
    """Let `write` fill a folder aside, then mark it complete and rename it to `target`, replacing
    what was there.

    Args:
        marked: whether the folder gets the marker COMPLETE with its files' hashes.

    Raises:
        OutputError: no room or no permission; what was there before is still there.
    """
    target = target.absolute()  # the current folder's name is empty otherwise
    aside, old = (
        target.with_name(f".{target.name}.partial"),
        target.with_name(f".{target.name}.old"),
    )
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        write(aside)
        if marked:
            _mark(aside)
        sync(aside)
        _put_in_place(aside, target, old)
    except BaseException as error:  # Ctrl-C, too, leaves nothing
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise unwritable(target, error) from error
        raise
    shutil.rmtree(old, ignore_errors=True)
    return target


def _mark(folder: Path) -> None:
    hashes = {name: hash_of(folder / name) for name in sorted(_names(folder))}
    write_whole(folder / COMPLETE, json.dumps(hashes, indent=1).encode())
    _share_alike(folder)


def _share_alike(folder: Path) -> None:
    """Give all files the mode that the umask gives, which the marker has.

    safetensors leaves its files readable by their owner alone.
    """
    mode = stat.S_IMODE((folder / COMPLETE).stat().st_mode)
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(mode)


def _put_in_place(new: Path, target: Path, old: Path) -> None:
    """Rename `target` to `old` and `new` to `target`; where the second fails, undo the first."""
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
    try:
        if target.exists():
            os.replace(target, old)
        os.replace(new, target)
    except BaseException:
        if old.exists() and not target.exists():
            os.replace(old, target)
        raise
    sync(target.parent)


@contextlib.contextmanager
def unfinished(folder: Path, names: Sequence[str]) -> Iterator[None]:
    """Mark `folder` as unfinished while `names` are written into it.

    An exception removes them again. A kill leaves the marker UNFINISHED, and the next command that
    writes into the folder replaces them. The marker is locked as long as its writer lives.

    Raises:
        OutputError: no room or no permission.
    """
    marker = folder / UNFINISHED
    try:
        with marker.open("x", encoding="utf-8") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                lock(file.fileno())
            json.dump(list(names), file)
            file.flush()
            yield
    except BaseException as error:
        if not isinstance(error, FileExistsError):
            clear_leftovers(folder)
        if isinstance(error, OSError):
            raise unwritable(folder, error) from error
        raise
    marker.unlink()


def leftovers(folder: Path) -> set[str]:
    """Names in `folder` that a command which was killed left there: hidden files aside, an empty
    samples/, and what the marker UNFINISHED lists.

    Raises OutputError while the command still runs.
    """
    found = {name for name in os.listdir(folder) if _PARTIAL.fullmatch(name)}
    samples = folder / "samples"
    if samples.is_dir() and not samples.is_symlink() and not any(samples.iterdir()):
        found.add(samples.name)
    marker = folder / UNFINISHED
    if marker.is_file() and not marker.is_symlink():
        names = _listed(marker)
        found |= {UNFINISHED, *names, *(f".{name}.old" for name in names)}
    return found


def _listed(marker: Path) -> list[str]:
    """The names in a marker; none of one that this program did not write."""
    with marker.open("rb") as file:
        try:
            lock(file.fileno(), shared=True)
        except BlockingIOError:
            raise OutputError(
                f"another process writes {marker.parent}",
                "one command at a time in a folder",
                "wait for it, or stop it first",
            ) from None
        except OSError:
            pass  # a file system without locks
    try:
        names = read_json(marker, LARGEST_MARKER)
    except (OSError, ValueError):
        return []
    written = isinstance(names, list) and all(name in WRITTEN for name in names)
    return names if written else []


def clear_leftovers(folder: Path) -> None:
    """Remove what `leftovers` names, the marker last. Failures are ignored."""
    for name in sorted(leftovers(folder) if folder.is_dir() else (), key=UNFINISHED.__eq__):
        place = folder / name
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                place.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Rename it out of the way, then delete it: a kill leaves the whole of it or nothing under its
    name. Failures are ignored.
    """
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.replace(folder, old)
    shutil.rmtree(old, ignore_errors=True)


def check_folder(folder: Path) -> None:
    """Raises OutputError unless the folder was written to its end and every file is what it was
    then.

    Files whose names begin with a dot don't count: file managers and hubs leave some of their own.
    """
    remedy = "give another checkpoint of the run, or the finished run"
    try:
        hashes = read_json(folder / COMPLETE, LARGEST_MARKER)
    except FileNotFoundError:
        got = (
            f"{folder} was not written to its end"
            if folder.is_dir()
            else f"there is no folder {folder}"
        )
        raise OutputError(got, f"a folder with the marker {COMPLETE}", remedy) from None
    except (OSError, ValueError) as error:
        raise OutputError(
            f"{folder}/{COMPLETE} is damaged: {error}", "the marker as it was written", remedy
        ) from None
    if not isinstance(hashes, dict) or _names(folder) - {COMPLETE} != {
        name for name in hashes if not name.startswith(".")
    }:
        raise OutputError(
            f"{folder} holds other files than its marker names",
            "the folder as it was written",
            remedy,
        )
    for name, expected in hashes.items():
        if not name.startswith(".") and _hash_or_none(folder / name) != expected:
            raise OutputError(f"{folder / name} is damaged", "the file as it was written", remedy)


def _hash_or_none(path: Path) -> str | None:
    """Return the hash of a file, None if it can't be read."""
    try:
        return hash_of(path) if path.is_file() else None
    except OSError:
        return None


def _names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir() if not file.name.startswith(".")}


def hash_of(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as handle:
        while chunk := handle.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk. Windows opens no folders, and syncs files
    that are open for writing alone.
    """
    posix = hasattr(os, "O_DIRECTORY")
    if not posix and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if posix else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unwritable(path: Path, error: Exception) -> OutputError:
    reason = getattr(error, "strerror", None) or error
    return OutputError(
        f"{path} can't be written: {reason}",
        "a folder that can be made and written, with room for the run",
        "free space, correct the permissions, or choose another --output-dir; what was "
        "written before is intact",
    )


def existing(path: Path) -> Path:
    """The path itself, or its nearest parent that exists."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return place


def free_bytes(path: Path) -> int:
    """Free space, in bytes, where `path` is or would be made."""
    return shutil.disk_usage(existing(path)).free


def finite(value: Any) -> Any:
    """`value` with None for NaN and infinities, for which JSON has no numbers."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
