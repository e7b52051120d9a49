"""The folder of one run, and how things are put into it: whole or not at all.

A folder of weights (`final/`, a checkpoint) is written under another name, synced, marked and
renamed. Its marker COMPLETE holds a hash of every file, so that what was damaged later is found
when it is read and never applied."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qzo_diffusion.core.errors import OutputError

COMPLETE = "COMPLETE"
SCALES = "scales.safetensors"


def default_output_dir(outputs: Path, name: str) -> Path:
    """outputs/<name>, with a number behind it where that exists."""
    candidate, count = outputs / name, 2
    while candidate.exists():
        candidate, count = outputs / f"{name}-{count}", count + 1
    return candidate


def newest_run(outputs: Path) -> Path:
    """The folder below `outputs` whose journal or metrics were written last.

    Raises OutputError when there is none.
    """
    written = [
        path for name in ("journal.qzo", "metrics.jsonl") for path in outputs.glob(f"*/{name}")
    ]
    if not written:
        raise OutputError(
            f"no run in {outputs}", "a run to go on with", "give its folder: --resume PATH"
        )
    return max(written, key=lambda path: path.stat().st_mtime_ns).parent


class RunFolder:
    """Names and writes the files of a run.

    `create` makes a new one, the constructor opens what is there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, remedy: str | None = None) -> "RunFolder":
        """Raises OutputError when the folder holds something already, with the caller's `remedy`,
        or can't be written.
        """
        check_empty(
            path, remedy or f"choose another --output-dir, or go on with that run: --resume {path}"
        )
        try:
            (path / "samples").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(path, error) from error
        return cls(path)

    def write_text(self, name: str, text: str) -> None:
        write_whole(self.path / name, text.encode())

    def write_json(self, name: str, content: Any) -> None:
        self.write_text(name, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def save_scales(
        self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
    ) -> Path:
        """`<name>/scales.safetensors` in a complete folder."""
        return write_folder(
            self.path / name, lambda folder: save_tensors(folder / SCALES, tensors, metadata)
        )


ANOTHER = "choose another --output-dir"


def check_empty(path: Path, remedy: str = ANOTHER) -> None:
    """Raises OutputError when there is something at `path` already, or it can't be made there."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise OutputError(
            f"{path} exists and is not an empty folder",
            "a new output folder; a run is never overwritten",
            remedy,
        )
    place = path.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise _unwritable(path, NotADirectoryError(errno.ENOTDIR, f"{place} is no folder"))
    if not os.access(place, os.W_OK | os.X_OK):
        raise _unwritable(
            path, PermissionError(errno.EACCES, f"no permission to write into {place}")
        )


def check_new(path: Path, remedy: str = ANOTHER) -> None:
    """As `check_empty`, for what `write_folder` puts in the place of `path`.

    That may not be the current folder, although it is empty: whoever stands in it would be left in
    one that was deleted."""
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
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise _unwritable(path, error) from error


def write_folder(target: Path, write: Callable[[Path], None]) -> Path:
    """Let `write` fill a folder aside, then mark it complete and rename it to `target`, replacing
    what was there.

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
        hashes = {name: _hash(aside / name) for name in sorted(_names(aside))}
        write_whole(aside / COMPLETE, json.dumps(hashes, indent=1).encode())
        _sync(aside)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(target, old)
        os.replace(aside, target)
        _sync(target.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise _unwritable(target, error) from error
    shutil.rmtree(old, ignore_errors=True)
    return target


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
        hashes = json.loads((folder / COMPLETE).read_bytes())
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
        if not name.startswith(".") and _hash(folder / name) != expected:
            raise OutputError(f"{folder / name} is damaged", "the file as it was written", remedy)


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    # Never without metadata: safetensors writes a header that it can't read when there are no
    # tensors either.
    facts = {"format": "pt"} | dict(metadata or {})
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, facts
    )
    _sync(path)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises OutputError when it is damaged or missing.
    """
    try:
        with safe_open(path, "pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            return tensors, handle.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise OutputError(
            f"{path} is damaged: {error}", "a safetensors file of this program", "give another run"
        ) from None


def load_scales(run: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tuned scales of a run folder (its `final/`), of a checkpoint folder, or of a safetensors
    file, with metadata.

    Raises:
        OutputError: there are none, or they are damaged or were not finished.
    """
    if run.is_file():
        return load_tensors(run)
    folder = run / "final" if (run / "final").is_dir() else run
    if not (folder / SCALES).is_file():
        remedy = "give the folder of a finished run, or one of its checkpoints"
        raise OutputError(f"no tuned scales in {run}", f"final/{SCALES}", remedy)
    check_folder(folder)
    return load_tensors(folder / SCALES)


def settings_file(run: Path) -> Path:
    """config.yaml of whatever `load_scales` reads: of a run, or of the run that its `final/` or a
    checkpoint belongs to.

    Raises:
        OutputError: there is none.
    """
    place = run.resolve()  # so that "." has parents too
    folder = place.parent if place.is_file() else place
    candidates = [folder]
    if folder.name == "final":
        candidates.append(folder.parent)
    if folder.parent.name == "checkpoints":
        candidates.append(folder.parent.parent)
    for candidate in candidates:
        if (candidate / "config.yaml").is_file():
            return candidate / "config.yaml"
    raise OutputError(
        f"no config.yaml in {run}",
        "the folder of a run",
        "give --run a run folder or one of its checkpoints",
    )


def _names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir() if not file.name.startswith(".")}


def _hash(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as handle:
        while chunk := handle.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unwritable(path: Path, error: Exception) -> OutputError:
    reason = getattr(error, "strerror", None) or error
    return OutputError(
        f"{path} can't be written: {reason}",
        "a folder that can be made and written, with room for the run",
        "free space, correct the permissions, or choose another --output-dir; what was "
        "written before is intact",
    )
