"""Find the caption of each image.

For each image the first source that has text wins:

    metadata.jsonl   a line {"file_name": "a.png", "text": "a cat"}; names are relative
                     to the folder it lies in
    a.txt            beside a.png
    a.caption        beside a.png
    --caption        one text for all images that have none of their own

A caption file that matches no image gives a note: to train for days on empty captions because of a
file name is the costliest mistake that other tools allow. For the same reason a wrong line in
metadata.jsonl is an error with its number. Names are compared as composed Unicode, so names that
look alike are equal; a name with the same bytes comes first."""

import functools
import os
import posixpath
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from qzo_diffusion.core.errors import DataError
from qzo_diffusion.diffusion.listing import (
    CAPTION_SUFFIXES,
    METADATA_NAME,
    Listing,
    is_metadata,
    is_sidecar,
    list_files,
    listed,
    relative_id,
)
from qzo_diffusion.diffusion.metadata_file import line_error, metadata_lines, shown
from qzo_diffusion.diffusion.text_file import decode

PLACEHOLDER = "[trigger]"

# Text files that come with collections of images but are not captions.
_PAPERS = {
    "attribution",
    "attributions",
    "copying",
    "credits",
    "licence",
    "license",
    "notice",
    "readme",
}

_Sidecars = Mapping[tuple[Path, str], Path]  # (image, suffix) -> caption file
# an event, such as "captions are empty" -> the files that it happened to, in order
_Notes = dict[str, dict[str, None]]


@dataclass(frozen=True)
class Caption:
    """One caption.

    `source` is "metadata.jsonl", "txt", "caption", "--caption" or "none" (then the text is empty).
    `place` is a file, with the line in metadata.jsonl, or "--caption".
    """

    text: str
    source: str
    place: str = field(default="", compare=False)


@dataclass(frozen=True)
class Captions:
    """A caption for every requested image, and notes for the user on how the captions were read."""

    by_file: dict[Path, Caption]
    notes: tuple[str, ...]


def read_captions(
    folder: Path,
    files: Sequence[Path],
    *,
    fallback: str | None,
    trigger: str | None,
    other: Path | None = None,
) -> Captions:
    """Find the caption of each of `files`, images at any depth below `folder`.

    Args:
        fallback: the text of --caption; "" asks for unconditional training, None for no fallback.
        trigger: replaces "[trigger]" in every caption.
        other: the folder of validation images while training images are read, and the other way
            round. If it lies inside `folder`, its caption files and the lines of metadata.jsonl
            for its images are skipped. Otherwise its metadata.jsonl may hold lines for images in
            `folder`; they count where `folder` has none of its own.

    Raises:
        DataError: a wrong line in metadata.jsonl, no image with a caption, caption files of which
            none matches, or a "[trigger]" without a trigger.
    """
    noted: _Notes = {}
    listing = list_files(folder, skip=other)
    metadata: dict[Path, Caption] = {}
    for path in filter(is_metadata, listing.files):
        _add_metadata(metadata, path, folder, files, other, listing, noted)
    if other is not None and not _is_below(other, folder):
        metadata = _metadata_of_other(other, folder, files) | metadata
    present = [path for path in listing.files if is_sidecar(path)]
    sidecars = _match_sidecars(folder, files, metadata, present, noted)
    by_file = {}
    for image in files:
        found = _own_caption(folder, image, metadata, sidecars, noted)
        by_file[image] = found or (
            Caption("", "none")
            if fallback is None
            else Caption(fallback.strip(), "--caption", "--caption")
        )
    check_any_caption(by_file.values(), folder)
    notes = [f"{len(names)} {what}: {listed(list(names))}" for what, names in noted.items()]
    return Captions(_with_trigger(by_file, trigger, folder, notes), tuple(notes))


def check_any_caption(captions: Iterable[Caption], folder: Path) -> None:
    """Check that at least one caption is present: a model trained without any would learn nothing
    that a prompt can call.

    Raises:
        DataError: every caption is missing.
    """
    if all(caption.source == "none" for caption in captions):
        raise DataError(
            f"no captions for the images in {folder}",
            f"{METADATA_NAME}, or a .txt or .caption file beside an image with the same name",
            'add captions, or pass --caption "a picture in [trigger] style" (or --caption "" '
            "to train without text)",
        )


def _note(noted: _Notes, what: str, name: str) -> None:
    """Add a file to the note on a kind of event. A file that is read for two images counts once."""
    noted.setdefault(what, {})[name] = None


def _read_text(path: Path, folder: Path, noted: _Notes) -> str:
    """Read a caption file, and note its encoding if it is not UTF-8."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror}",
            "caption files that can be read",
            "change its permissions, or remove it",
        ) from error
    name = relative_id(path, folder)
    text, encoding = decode(data)
    if encoding is not None:
        _note(noted, f"caption files are not UTF-8, read as {encoding}", name)
    if "\0" in text:
        _note(noted, "caption files hold NUL characters, which are left out", name)
    return text.replace("\0", "")


def _add_metadata(
    captions: dict[Path, Caption],
    path: Path,
    folder: Path,
    files: Sequence[Path],
    other: Path | None,
    listing: Listing,
    noted: _Notes,
) -> None:
    """Add the captions of one metadata.jsonl.

    Its names are looked up among the images found, and never opened as paths.
    """
    near = [image for image in files if image.is_relative_to(path.parent)]
    exact = {image.relative_to(path.parent).as_posix(): image for image in near}
    composed = {_composed(name): image for name, image in exact.items()}
    for where, name, text in _lines(path, folder, noted):
        image = exact.get(name) or composed.get(_composed(name))
        printable = name.encode("utf-8", "backslashreplace").decode()
        if image is None and listing.leaves_out(path.parent / name):
            _note(noted, f"lines of {METADATA_NAME} are for files that are no data", printable)
        elif (
            image is None
            and other is not None
            and _is_below(path.parent / posixpath.dirname(name), other)
        ):
            _note(noted, f"lines of {METADATA_NAME} are for images in {other}", printable)
        elif image is None:
            raise line_error(
                where, f"{shown(name)} is not among the images found below {path.parent}"
            )
        elif image in captions:
            raise line_error(where, f"{shown(name)} has a caption already")
        else:
            captions[image] = Caption(text.strip(), METADATA_NAME, where)


def _metadata_of_other(other: Path, folder: Path, files: Sequence[Path]) -> dict[Path, Caption]:
    """Read the captions that metadata.jsonl in `other` holds for images in `folder`.

    Its other lines belong to its own images.
    """
    # Real paths are compared, since `folder` may be spelled otherwise here, or be a link.
    real = functools.cache(_real)
    exact = {(real(image.parent), image.name): image for image in files}
    composed = {(place, _composed(name)): image for (place, name), image in exact.items()}
    captions: dict[Path, Caption] = {}
    for path in filter(is_metadata, list_files(other, skip=folder).files):
        for where, name, text in _lines(path, other, {}):
            place, last = real(path.parent / posixpath.dirname(name)), posixpath.basename(name)
            image = exact.get((place, last)) or composed.get((place, _composed(last)))
            if image is None and _is_below(place, folder):
                raise line_error(
                    where, f"{shown(name)} is not among the images found below {folder}"
                )
            if image is not None and image in captions:
                raise line_error(where, f"{shown(name)} has a caption already")
            if image is not None:
                captions[image] = Caption(text.strip(), METADATA_NAME, where)
    return captions


def _lines(path: Path, folder: Path, noted: _Notes) -> Iterator[tuple[str, str, str]]:
    return metadata_lines(path, _read_text(path, folder, noted))


def _is_below(place: Path, folder: Path) -> bool:
    return _real(place).is_relative_to(_real(folder))


def _real(place: Path) -> Path:
    try:
        return Path(_composed(os.path.realpath(place)))
    except ValueError:  # A line of metadata.jsonl may hold a name that no file can have.
        return place


def _composed(name: str) -> str:
    """Return a name in Unicode NFC: a Mac stores "é" as two characters, other systems as one."""
    return unicodedata.normalize("NFC", name)


def _match_sidecars(
    folder: Path,
    files: Sequence[Path],
    metadata: Mapping[Path, Caption],
    present: Sequence[Path],
    noted: _Notes,
) -> _Sidecars:
    """Find the .txt and .caption files of each image, and note those that belong to no image.

    Raises:
        DataError: captions are needed, and no caption file belongs to an image.
    """
    exact = {(path.with_suffix(""), path.suffix.lower()): path for path in reversed(present)}
    composed = {(_composed_stem(path), path.suffix.lower()): path for path in reversed(present)}
    found: dict[tuple[Path, str], Path] = {}
    for image in files:
        for suffix in CAPTION_SUFFIXES:
            path = exact.get((image.with_suffix(""), suffix)) or composed.get(
                (_composed_stem(image), suffix)
            )
            if path is not None:
                found[image, suffix] = path
    stems, matched = {_composed_stem(image) for image in files}, set(found.values())
    lonely = []
    for path in present:
        if _composed_stem(path) in stems:
            if path not in matched:
                _note(
                    noted,
                    "caption files are not read: another has the same name",
                    relative_id(path, folder),
                )
        elif path.stem.lower() not in _PAPERS:
            lonely.append(relative_id(path, folder))
            _note(noted, "caption files match no image", lonely[-1])
    if lonely and not matched and any(image not in metadata for image in files):
        raise DataError(
            f"{len(lonely)} caption files in {folder}, and none has the name of an image: "
            f"{listed(lonely)}",
            "a.txt or a.caption in the same folder as a.png",
            "rename or move them, or take them out of the folder",
        )
    return found


def _composed_stem(path: Path) -> Path:
    return path.with_name(_composed(path.stem))


def _own_caption(
    folder: Path, image: Path, metadata: Mapping[Path, Caption], sidecars: _Sidecars, noted: _Notes
) -> Caption | None:
    """Return the first source that has text. An empty source is noted and skipped."""
    if image in metadata:
        if metadata[image].text:
            return metadata[image]
        _note(noted, f"texts in {METADATA_NAME} are empty", relative_id(image, folder))
    for suffix in CAPTION_SUFFIXES:
        path = sidecars.get((image, suffix))
        if path is None:
            continue
        if text := _read_text(path, folder, noted).strip():
            return Caption(text, suffix[1:], str(path))
        _note(noted, "captions are empty", relative_id(path, folder))
    return None


def _with_trigger(
    captions: dict[Path, Caption], trigger: str | None, folder: Path, notes: list[str]
) -> dict[Path, Caption]:
    marked = [image for image, caption in captions.items() if PLACEHOLDER in caption.text]
    if not trigger:
        if marked:
            raise DataError(
                f"{PLACEHOLDER} in the caption of {marked[0]} ({len(marked)} in all), and no "
                "trigger",
                f"a word to put in place of {PLACEHOLDER}",
                "pass --trigger WORD, or take the placeholder out of the captions",
            )
        return captions
    if not marked and not any(trigger in caption.text for caption in captions.values()):
        notes.append(
            f"the trigger {shown(trigger)} is used nowhere: no caption holds it or {PLACEHOLDER}"
        )
    return {
        image: replace(caption, text=caption.text.replace(PLACEHOLDER, trigger))
        for image, caption in captions.items()
    }
