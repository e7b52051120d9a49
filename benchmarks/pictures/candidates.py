"""Styles that the embedded model never saw: three that somebody drew, and treatments that its
training set aside, on drawings of a style that it knows.

A folder is such as a new user has: 40 drawings whose captions are plain names. None is of a concept
that a shipped prompt names, or that is kept out for the comparison with true drawings.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.content.folders import StyleFolder, write_images
from benchmarks.tiny.drawings import Drawings, load_drawings
from benchmarks.tiny.lessons import knowledge
from benchmarks.tiny.treatments import treat
from qzo_diffusion import resources
from qzo_diffusion.diffusion.prompts import read_prompt_file

TRAIN, VALIDATION = 40, 16


@dataclass(frozen=True)
class Candidate:
    """drawn: the style's key in the archive. treatment: laid over its drawings, if any."""

    drawn: str
    treatment: str | None = None


CANDIDATES = {
    "fluent_mono": Candidate("fluent_mono"),
    "fluent3d": Candidate("fluent3d"),
    "openmoji": Candidate("openmoji"),
    "navy_and_cream": Candidate("fluent_flat", "navy and cream"),
    "gold_on_black": Candidate("fluent_flat", "gold on black"),
    "stained_glass": Candidate("fluent_flat", "stained glass"),
    "two_inks": Candidate("fluent_flat", "two inks"),
}


def candidate_folder(
    name: str, data: Path, work: Path, taught: Sequence[str], held_out: int = VALIDATION
) -> StyleFolder:
    """Write the images of a candidate below `work`.

    Args:
        data: the folder of `emoji64.npz` and `meta.json`. taught: concepts that the model draws.
        held_out: how many drawings the held-out loss is of.

    Raises:
        ValueError: no such candidate, or too few drawings.
    """
    if name not in CANDIDATES:
        raise ValueError(f"no candidate {name!r}; there are {', '.join(CANDIDATES)}")
    train, validation = chosen(name, data, taught, held_out)
    compared = drawings(name, data, [one for one in knowledge().held_out if one in taught])
    images = work / "images" / name
    pictures = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in compared.images]
    return StyleFolder(
        name,
        write_images(images, train),
        write_images(images, validation),
        compared.names,
        compared.names,
        pictures,
    )


def chosen(
    name: str, data: Path, taught: Sequence[str], held_out: int = VALIDATION, seed: int = 0
) -> tuple[Drawings, Drawings]:
    """Drawings to train on and to hold out, the same concepts in every style that has them.

    Those to train on are the same for any number to hold out.

    Raises:
        ValueError: too few drawings.
    """
    away = prompted() | set(knowledge().held_out)
    free = sorted(name for name in taught if name not in away)
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(free))
    known = set(drawings(name, data, free).names)
    names = [free[index] for index in order if free[index] in known][: TRAIN + held_out]
    if len(names) < TRAIN + held_out:
        raise ValueError(f"{len(names)} drawings of {name}, {TRAIN + held_out} are needed")
    parts = sorted(names[:TRAIN]), sorted(names[TRAIN:])
    return drawings(name, data, parts[0]), drawings(name, data, parts[1])


def drawings(name: str, data: Path, concepts: Sequence[str]) -> Drawings:
    """Those of a candidate, captioned by their plain names."""
    one = CANDIDATES[name]
    found = load_drawings(data, {one.drawn: ""}, list(concepts))
    images = found.images if one.treatment is None else treat(one.treatment, found.images)
    return replace(found, images=images, captions=found.names)


def prompted() -> set[str]:
    """Concepts that the shipped prompts of the embedded model name."""
    files = [resources.shipped("prompts") / name for name in ("tiny_grid.txt", "tiny_score.txt")]
    return {text for file in files for text in read_prompt_file(file).texts}
