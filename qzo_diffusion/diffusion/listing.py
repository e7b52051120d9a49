"""List the files below a folder of images that are data.

The list leaves out hidden files, files that this program wrote (runs, samples, mixes, exports), and
files that other programs leave beside pictures (masks, thumbnails). Only the content of the folder
is judged, never the folder itself: so a folder of samples can be named as data.
"""

import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qzo_diffusion.core.errors import DataError
from qzo_diffusion.diffusion.images import is_image_name
from qzo_diffusion.system.reading import read_json

METADATA_NAME = "metadata.jsonl"
CAPTION_SUFFIXES = (".txt", ".caption")

MASKS, THUMBNAILS, SYSTEM = "masks", "thumbnails", "files of the system"

_OUTPUTS = "outputs"  # the folder of runs without --output-dir
_JOURNAL, _MARKER, _TABLE, _GRID = "journal.qzo", "COMPLETE", "prompts.json", "grid.png"
_BESIDE_CONFIG = {"environment.json", "metrics.jsonl", "dataset.json", "evaluation.json"}
_STEP = re.compile(r"step_\d{6,}\.png")
_LARGEST_TABLE = 2**24  # the most bytes of a prompts.json or COMPLETE that is read

# Never data, in any folder.
_FOLDERS = {
    "@eadir": THUMBNAILS,  # Synology
    "#recycle": SYSTEM,
    "@recycle": SYSTEM,  # QNAP
    "@recently-snapshot": SYSTEM,
    "__macosx": SYSTEM,
    "$recycle.bin": SYSTEM,
    "system volume information": SYSTEM,
    "lost+found": SYSTEM,
}
_FOLDER_ENDINGS = {".lrdata": THUMBNAILS, ".photoslibrary": SYSTEM}
# Never data, unless their pictures have captions of their own.
_MASK_FOLDER = re.compile(r"(.*[ _-])?masks?")
_THUMBNAIL_FOLDERS = dict.fromkeys(
    ("thumb", "thumbs", "_thumbs", "thumbnail", "thumbnails"), THUMBNAILS
)
_FILES = {
    "thumbs.db": THUMBNAILS,
    "ehthumbs.db": THUMBNAILS,
    "ehthumbs_vista.db": THUMBNAILS,
    "zbthumbnail.info": THUMBNAILS,
    ".ds_store": SYSTEM,
    "desktop.ini": SYSTEM,
    "picasa.ini": SYSTEM,
    "icon\r": SYSTEM,
}
# OneTrainer's names: never data.
_LABELS = re.compile(r".*-(mask|cond)label")
# Other names: left out only beside the picture that they belong to.
_BESIDE = (
    (MASKS, re.compile(r"(.+)[ ._-](?:masks?|matte)")),
    (MASKS, re.compile(r"masks?[ ._-](.+)")),
    (THUMBNAILS, re.compile(r"(.+)[ ._-](?:thumb|thumbnail|\d{2,4}x\d{2,4})")),  # WordPress
    (THUMBNAILS, re.compile(r"(?:thumb|thumbnail|tn)[ ._-](.+)")),
)


@dataclass
class Listing:
    """The files that are data, in the order of their paths; links to folders count as files.

    own: files and folders that this program wrote. left: files of other programs, by kind.
    """

    files: list[Path] = field(default_factory=list)
    own: list[Path] = field(default_factory=list)
    left: dict[str, list[Path]] = field(default_factory=dict)

    def leaves_out(self, path: Path) -> bool:
        """Return whether `path` is left out, or lies in a folder that is."""
        out = {*self.own, *itertools.chain(*self.left.values())}
        return not out.isdisjoint((path, *path.parents))

    def forget(self, used: set[Path]) -> None:
        """Take files that are used after all out of those that are left out."""
        for kind, files in list(self.left.items()):
            self.left[kind] = [file for file in files if file not in used]
            if not self.left[kind]:
                del self.left[kind]


def list_files(folder: Path, *, skip: Path | None = None, own_outputs: bool = False) -> Listing:
    """List all files below `folder` that are data, without those below `skip`.

    Links to folders are not followed, since they may lead in circles or far away.

    Args:
        own_outputs: also list files that this program wrote.

    Raises:
        DataError: a sub-folder cannot be read.
    """
    walk = _Walk(folder, None if skip is None else os.path.realpath(skip), own_outputs)
    for root, folders, names in os.walk(folder, onerror=_refuse_unreadable):
        walk.enter(Path(root), folders, names)
    walk.listing.files.sort()
    return walk.listing


@dataclass
class _Walk:
    top: Path
    skipped: str | None
    own_outputs: bool
    listing: Listing = field(default_factory=Listing)
    stems: dict[Path, set[str]] = field(default_factory=dict)  # of the images, by folder

    def enter(self, place: Path, folders: list[str], names: list[str]) -> None:
        """Add the data in one folder, and leave in `folders` those to enter next."""
        self.stems[place] = {_stem(name) for name in names if is_image_name(Path(name))}
        if place != self.top and self._left_out(place, folders, names):
            folders.clear()
            return
        for name in folders:
            if kind := _FOLDERS.get(name.lower()):
                # not entered: those of the system may be unreadable
                self.listing.left.setdefault(kind, []).append(place / name)
        shown = [name for name in folders if not (name.startswith(".") or name.lower() in _FOLDERS)]
        folders[:] = [name for name in shown if os.path.realpath(place / name) != self.skipped]
        self.listing.files += [place / name for name in shown if (place / name).is_symlink()]
        for name in names:
            self._add(place, name, names)

    def _left_out(self, place: Path, folders: list[str], names: list[str]) -> bool:
        kind = _kind_of_folder(place, names, self.stems[place], self.stems[place.parent])
        if kind:
            self.listing.left.setdefault(kind, []).append(place)
            return True
        if not self.own_outputs and _is_own(place, [*folders, *names]):
            self.listing.own.append(place)
            return True
        return False

    def _add(self, place: Path, name: str, names: Sequence[str]) -> None:
        if kind := _kind_of_file(name, self.stems[place]):
            self.listing.left.setdefault(kind, []).append(place / name)
        elif not self.own_outputs and self._is_own_picture(place, name, names):
            self.listing.own.append(place / name)
        elif not name.startswith("."):
            self.listing.files.append(place / name)

    def _is_own_picture(self, place: Path, name: str, names: Sequence[str]) -> bool:
        """Return whether a file is a grid of samples, or a loose picture without caption in the
        outputs.
        """
        if name == _GRID:
            return _is_table(place / _TABLE)
        loose = place != self.top and place.name == _OUTPUTS and is_image_name(Path(name))
        return loose and not _has_captions(names, self.stems[place])


def is_sidecar(path: Path) -> bool:
    """Return whether a name may be that of a caption file beside an image."""
    return path.suffix.lower() in CAPTION_SUFFIXES


def is_metadata(path: Path) -> bool:
    return path.name.lower() == METADATA_NAME


def relative_id(path: Path, folder: Path) -> str:
    """Return the posix path relative to `folder`, with backslash escapes for bytes that are not
    UTF-8.
    """
    name = path.relative_to(folder).as_posix()
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def listed(names: Sequence[str], *, between: str = ", ", limit: int = 10) -> str:
    """Return the first names in one line, and the number of those left."""
    more = [f"... and {len(names) - limit} more"] if len(names) > limit else []
    return between.join([*names[:limit], *more])


def notes_on_left_out(listing: Listing, folder: Path) -> list[str]:
    """Return a note on files that this program wrote, and one on files of other programs."""
    notes = []
    if listing.own:
        names = sorted(relative_id(path, folder) for path in listing.own)
        notes.append(f"{len(names)} outputs of this program are no data: {listed(names)}")
    if listing.left:
        kinds = [
            f"{len(paths)} {kind} ({listed(sorted(relative_id(path, folder) for path in paths))})"
            for kind, paths in sorted(listing.left.items())
        ]
        notes.append(f"left by other programs and no data: {'; '.join(kinds)}")
    return notes


def _kind_of_file(name: str, stems: set[str]) -> str | None:
    """Return the kind of a file that another program left, and None for all others."""
    path = Path(name)
    if kind := _FILES.get(name.lower()):
        return kind
    if name.startswith("._"):  # macOS, beside a file on a foreign disk
        return SYSTEM if is_image_name(path) else None
    return _kind_of_stem(_stem(name), stems) if is_image_name(path) or is_sidecar(path) else None


def _kind_of_stem(stem: str, stems: set[str]) -> str | None:
    if _LABELS.fullmatch(stem):
        return MASKS
    for kind, pattern in _BESIDE:
        found = pattern.fullmatch(stem)
        if found and not stems.isdisjoint((found[1], _stem(found[1]))):
            return kind
    return None


def _stem(name: str) -> str:
    """Return a name without ending and in lower case: files of one picture may differ in both."""
    path = Path(name)
    return (path.stem if is_image_name(path) or is_sidecar(path) else name).casefold()


def _kind_of_folder(
    place: Path, names: Sequence[str], stems: set[str], above: set[str]
) -> str | None:
    name = place.name.lower()
    if kind := _FOLDER_ENDINGS.get(place.suffix.lower()):
        return kind
    kind = MASKS if _MASK_FOLDER.fullmatch(name) else _THUMBNAIL_FOLDERS.get(name)
    if kind and (stems & above or not _has_captions(names, stems)):
        return kind
    return None


def _has_captions(names: Sequence[str], stems: set[str]) -> bool:
    return any(
        is_metadata(Path(name)) or (is_sidecar(Path(name)) and _stem(name) in stems)
        for name in names
    )


def _is_own(folder: Path, entries: Sequence[str]) -> bool:
    """Return whether this program wrote the folder: a run, a mix, an export, a checkpoint or
    samples.
    """
    there = set(entries)
    if _JOURNAL in there or ("config.yaml" in there and there & _BESIDE_CONFIG):
        return True
    if _MARKER in there and isinstance(_json(folder / _MARKER), dict):
        return True
    if "config.yaml" in there and (folder / "final" / _MARKER).is_file():
        return True
    steps = any(_STEP.fullmatch(name) for name in entries)
    return (_GRID in there and steps) or (_TABLE in there and _is_table(folder / _TABLE))


def _is_table(path: Path) -> bool:
    """Return whether a file is the table of prompts that this program writes beside pictures."""
    rows = _json(path)
    return isinstance(rows, list) and all(
        isinstance(row, dict) and "prompt" in row and ("file" in row or "row" in row)
        for row in rows
    )


def _json(path: Path) -> Any:
    try:
        return read_json(path, _LARGEST_TABLE) if path.is_file() else None
    except (OSError, ValueError):
        return None


def _refuse_unreadable(error: OSError) -> None:
    raise DataError(
        f"cannot list {error.filename}: {error.strerror}",
        "a folder of images whose sub-folders can all be read",
        "change its permissions, or move it elsewhere",
    ) from error
