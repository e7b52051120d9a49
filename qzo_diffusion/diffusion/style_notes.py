"""Write remarks on a folder of images: one for each kind of event, not one for each file."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from qzo_diffusion.diffusion.images import is_image_name
from qzo_diffusion.diffusion.listing import is_metadata, is_sidecar, listed
from qzo_diffusion.diffusion.sample import LARGE_CUT, LARGE_GROWTH, Sample

_KOHYA_FOLDER = re.compile(r"(.*/)?\d+_[^/]+(?=/)")


def bad_by_kind(bad: Sequence[tuple[str, str]]) -> list[str]:
    """Return one line for each kind of reason, so that many files of one kind do not hide a file of
    another.
    """
    kinds: dict[str, list[tuple[str, str]]] = {}
    for name, reason in bad:
        kinds.setdefault(reason.partition(":")[0].partition(" (")[0], []).append((name, reason))
    lines = []
    for kind, found in kinds.items():
        if len({reason for _, reason in found}) == 1:
            lines.append(f"{listed([name for name, _ in found])}: {found[0][1]}")
        else:
            lines.append(
                f"{len(found)} {kind}: {listed([f'{name} ({reason})' for name, reason in found])}"
            )
    return lines


def notes_on_missing_captions(samples: Sequence[Sample]) -> list[str]:
    names = [sample.id for sample in samples if sample.caption_source == "none"]
    return [f"{len(names)} images have no caption: {listed(names)}"] if names else []


def notes_on_files(files: Sequence[Path]) -> list[str]:
    others = [
        path for path in files if not (is_image_name(path) or is_sidecar(path) or is_metadata(path))
    ]
    if not others:
        return []
    kinds = counted([kind_of_file(path) for path in others])
    return [f"{len(others)} other files were not used: {kinds}"]


def kind_of_file(path: Path) -> str:
    if path.is_dir():
        return "links to folders"
    return path.suffix.lower() or "no extension"


def notes_on_copies(samples: Sequence[Sample]) -> list[str]:
    by_hash: dict[str, list[str]] = {}
    for sample in samples:
        by_hash.setdefault(sample.sha256, []).append(sample.id)
    copies = [listed(names, between=" = ") for names in by_hash.values() if len(names) > 1]
    return [f"{len(copies)} images are there more than once: {listed(copies)}"] if copies else []


def notes_on_shapes(samples: Sequence[Sample]) -> list[str]:
    cut = [f"{one.id} ({one.cut:.0%})" for one in samples if one.cut > LARGE_CUT]
    grown = [f"{one.id} ({one.enlarged:.1f})" for one in samples if one.enlarged > LARGE_GROWTH]
    notes = [f"{len(cut)} images lose more than a third to the crop: {listed(cut)}"] if cut else []
    if grown:
        notes.append(f"{len(grown)} images are enlarged more than twice: {listed(grown)}")
    return notes


def notes_on_repeats(samples: Sequence[Sample]) -> list[str]:
    """Note folders named like `10_name`, which Kohya's trainers read as ten repeats."""
    folders = dict.fromkeys(
        found[0] for one in samples if (found := _KOHYA_FOLDER.match(one.id)) is not None
    )
    if not folders:
        return []
    return [
        f"numbers before names of folders are no repeats here: {listed(list(folders))}; "
        "data.repeats=N is for all images"
    ]


def notes_on_masks(samples: Sequence[Sample], masks: str) -> list[str]:
    if masks == "none":
        return []
    without = [one.id for one in samples if one.mask == "none"]
    rest = f"; all of these counts: {listed(without)}" if without else ""
    return [f"{len(samples) - len(without)} of {len(samples)} images have a mask{rest}"]


def counted(words: Sequence[str]) -> str:
    return ", ".join(f"{count} {word}" for word, count in Counter(words).most_common())
