"""Which caption belongs to which image.

For each image the first source that has text wins:

    metadata.jsonl   a line {"file_name": "a.png", "text": "a cat"}; names are relative to the folder it lies in
    a.txt            beside a.png
    a.caption        beside a.png
    --caption        one text for all images that have none of their own

A caption file that matches nothing is told, not skipped: training for days on empty captions because of a file name is
the costliest mistake other tools allow. For the same reason a wrong line in metadata.jsonl is an error with its number.
"""

import codecs
import json
import os
import posixpath
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from qzo_diffusion.core.errors import DataError

METADATA_NAME = "metadata.jsonl"
CAPTION_SUFFIXES = (".txt", ".caption")
PLACEHOLDER = "[trigger]"

# Text files that come with collections of images and are no captions.
_PAPERS = {"attribution", "attributions", "copying", "credits", "licence", "license", "notice", "readme"}
_EXPECTED_LINE = 'one JSON object a line, such as {"file_name": "a.png", "text": "a cat"}'

_Sidecars = Mapping[tuple[Path, str], Path]


@dataclass(frozen=True)
class Caption:
    """One caption; `source` is "metadata.jsonl", "txt", "caption", "--caption" or "none" (then the text is empty)."""

    text: str
    source: str


@dataclass(frozen=True)
class Captions:
    """A caption for every image asked for, and what a user should know about how they were read."""

    by_file: dict[Path, Caption]
    notes: tuple[str, ...]


def read_captions(
    folder: Path, files: Sequence[Path], *, fallback: str | None, trigger: str | None, skip: Path | None = None
) -> Captions:
    """Find the caption of each of `files`, images at any depth below `folder`.

    Args:
        fallback: the text of --caption; "" asks for unconditional training, None for no fallback.
        trigger: replaces "[trigger]" in every caption.
        skip: a sub-folder whose caption files belong to other images.

    Raises:
        DataError: a wrong line in metadata.jsonl, no image with a caption, caption files of which none matches, or a
            "[trigger]" without a trigger.
    """
    notes: list[str] = []
    present = visible_files(folder, skip=skip)
    metadata: dict[Path, str] = {}
    for path in present:
        if path.name == METADATA_NAME:
            _add_metadata(metadata, path, folder, files, notes)
    sidecars = {(path.with_suffix(""), path.suffix.lower()): path for path in reversed(present) if is_sidecar(path)}
    _check_sidecars(folder, files, metadata, sidecars, notes)
    by_file = {}
    for image in files:
        found = _own_caption(folder, image, metadata, sidecars, notes)
        by_file[image] = found or (Caption("", "none") if fallback is None else Caption(fallback.strip(), "--caption"))
    check_any_caption(by_file.values(), folder)
    return Captions(_with_trigger(by_file, trigger, folder, notes), tuple(notes))


def check_any_caption(captions: Iterable[Caption], folder: Path) -> None:
    """Raise DataError when every caption is missing: a model trained so would learn nothing that a prompt can call."""
    if all(caption.source == "none" for caption in captions):
        raise DataError(
            f"no captions for the images in {folder}",
            f"{METADATA_NAME}, or a .txt or .caption file beside an image with the same name",
            'add captions, or pass --caption "a picture in [trigger] style" (or --caption "" to train without text)',
        )


def visible_files(folder: Path, *, skip: Path | None = None) -> list[Path]:
    """All files below `folder` in the order of their paths, without hidden ones and without those below `skip`.

    Links to folders are not followed, since they may lead in circles or far away; they are listed as if they were
    files, so that they can be named to the user.
    """
    skipped = None if skip is None else os.path.realpath(skip)
    found: list[Path] = []
    for root, folders, names in os.walk(folder, onerror=_refuse_unreadable):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        folders[:] = [
            name for name in folders if not name.startswith(".") and os.path.realpath(os.path.join(root, name)) != skipped
        ]
        found += [Path(root, name) for name in names + links if not name.startswith(".")]
    return sorted(found)


def is_sidecar(path: Path) -> bool:
    """Whether the name is one that may hold the caption of the image beside it."""
    return path.suffix.lower() in CAPTION_SUFFIXES


def relative_id(path: Path, folder: Path) -> str:
    """The posix path relative to `folder`; bytes in a name that are not UTF-8 are shown as backslash escapes."""
    name = path.relative_to(folder).as_posix()
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _refuse_unreadable(error: OSError) -> None:
    raise DataError(
        f"cannot list {error.filename}: {error.strerror}",
        "a folder of images whose sub-folders can all be read",
        "change its permissions, or move it elsewhere",
    ) from error


def _read_text(path: Path, folder: Path, notes: list[str]) -> str:
    """The text of a caption file; what is not UTF-8 is read as UTF-16 (if marked so) or Latin-1, with a note."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror}",
            "caption files that can be read",
            "change its permissions, or remove it",
        ) from error
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        notes.append(f"{relative_id(path, folder)}: read as UTF-16; UTF-8 is expected")
        return data.decode("utf-16", errors="replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        notes.append(f"{relative_id(path, folder)}: not UTF-8, read as Latin-1")
        return data.decode("latin-1")


def _add_metadata(captions: dict[Path, str], path: Path, folder: Path, files: Sequence[Path], notes: list[str]) -> None:
    """Add the captions of one metadata.jsonl. Names are looked up among the images found, never opened as paths."""
    images = {_composed(image.relative_to(path.parent).as_posix()): image for image in files if image.is_relative_to(path.parent)}
    # Only a line feed ends a line: str.splitlines also splits at characters that JSON allows inside a string.
    for number, line in enumerate(_read_text(path, folder, notes).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        name, text = _parse_line(line, where)
        image = images.get(_composed(_inside(name, where)))
        if image is None:
            raise _line_error(where, f"{_shown(name)} is not among the images found below {path.parent}")
        if not Path(os.path.realpath(image)).is_relative_to(os.path.realpath(folder)):
            raise _line_error(where, f"{_shown(name)} is a link that leads out of {folder}")
        if image in captions:
            raise _line_error(where, f"{_shown(name)} has a caption already")
        captions[image] = text


def _parse_line(line: str, where: str) -> tuple[str, str]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _line_error(where, f"not JSON ({error})") from error
    if not isinstance(entry, dict):
        raise _line_error(where, f"a JSON {type(entry).__name__}, not an object")
    for key in ("file_name", "text"):
        if key not in entry:
            raise _line_error(where, f'no key "{key}"')
        if not isinstance(entry[key], str):
            raise _line_error(where, f'"{key}" is a {type(entry[key]).__name__}, not a string')
    # Half of a surrogate pair passes as JSON, and would stop the tokenizer and every file it is written to later.
    if any("\ud800" <= character <= "\udfff" for character in entry["text"]):
        raise _line_error(where, '"text" holds half of a Unicode surrogate pair')
    return entry["file_name"], entry["text"]


def _inside(name: str, where: str) -> str:
    """The name without "." and "..", refused when it leads out of the folder of metadata.jsonl."""
    normal = posixpath.normpath(name)
    if normal.startswith("/") or PureWindowsPath(name).drive or normal.split("/")[0] == "..":
        raise _line_error(where, f"{_shown(name)} leads out of the folder")
    return normal


def _line_error(where: str, problem: str) -> DataError:
    return DataError(f"{where}: {problem}", _EXPECTED_LINE, "correct that line, or remove it")


def _composed(name: str) -> str:
    """Unicode NFC: a Mac stores "é" as two characters, and names typed elsewhere hold it as one."""
    return unicodedata.normalize("NFC", name)


def _shown(name: str) -> str:
    return repr(name if len(name) <= 80 else name[:77] + "...")


def _check_sidecars(
    folder: Path, files: Sequence[Path], metadata: Mapping[Path, str], sidecars: _Sidecars, notes: list[str]
) -> None:
    """Note the .txt and .caption files that match no image; an error if that is all of them and captions are needed."""
    stems = {image.with_suffix("") for image in files}
    lonely = [path for (stem, _), path in sidecars.items() if stem not in stems and stem.name.lower() not in _PAPERS]
    if not lonely:
        return
    names = _listed([relative_id(path, folder) for path in sorted(lonely)])
    matched = any(stem in stems for stem, _ in sidecars)
    if not matched and any(image not in metadata for image in files):
        raise DataError(
            f"{len(lonely)} caption files in {folder}, and none has the name of an image: {names}",
            "a.txt or a.caption in the same folder as a.png",
            "rename or move them, or take them out of the folder",
        )
    notes.append(f"{len(lonely)} caption files match no image: {names}")


def _listed(names: Sequence[str], limit: int = 10) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _own_caption(folder: Path, image: Path, metadata: Mapping[Path, str], sidecars: _Sidecars, notes: list[str]) -> Caption | None:
    """The first source with text; an empty one is noted and passed over."""
    if image in metadata:
        if text := metadata[image].strip():
            return Caption(text, METADATA_NAME)
        notes.append(f"{relative_id(image, folder)}: its text in {METADATA_NAME} is empty")
    for suffix in CAPTION_SUFFIXES:
        path = sidecars.get((image.with_suffix(""), suffix))
        if path is None:
            continue
        if text := _read_text(path, folder, notes).strip():
            return Caption(text, suffix[1:])
        notes.append(f"{relative_id(path, folder)}: the caption is empty")
    return None


def _with_trigger(captions: dict[Path, Caption], trigger: str | None, folder: Path, notes: list[str]) -> dict[Path, Caption]:
    marked = [image for image, caption in captions.items() if PLACEHOLDER in caption.text]
    if not trigger:
        if marked:
            raise DataError(
                f"{PLACEHOLDER} in the caption of {marked[0]} ({len(marked)} in all), and no trigger",
                f"a word to put in place of {PLACEHOLDER}",
                "pass --trigger WORD, or take the placeholder out of the captions",
            )
        return captions
    if not marked:
        notes.append(f"the trigger {_shown(trigger)} is used nowhere: no caption holds {PLACEHOLDER}")
    return {image: Caption(caption.text.replace(PLACEHOLDER, trigger), caption.source) for image, caption in captions.items()}
