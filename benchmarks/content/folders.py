"""The styles: a folder to train on, images to hold out, and true drawings of held-out concepts.

`fluent_mono`, `fluent3d` and `twemoji` have 64 drawings to train on and 128 to hold out.
`twemoji24` is a small folder such as a new user has: 24 drawings with plain captions. Four are held
out, those that a run of seed 0 chooses itself, so that all seeds have the same held-out loss.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.tiny.drawings import Drawings, caption_of, load_drawings
from qzo_diffusion.diffusion.listing import METADATA_NAME
from qzo_diffusion.system.files import write_whole

STYLE_WORDS = {
    "fluent_mono": "mono style",
    "fluent3d": "3d style",
    "twemoji": "twemoji style",
}
TRAIN, HELD_OUT = 64, 128
SMALL = "twemoji24"
STYLES = ("fluent_mono", "fluent3d", "twemoji")
FOLDERS = (SMALL, *STYLES)
SMALL_NAMES = [
    *("red apple", "pear", "cherries", "tomato", "carrot", "hamburger", "french fries", "doughnut"),
    *("dog face", "cow face", "tiger face", "rabbit face", "frog", "turtle", "octopus"),
    *("lady beetle", "tulip", "cactus", "bicycle", "airplane", "sailboat", "castle", "umbrella"),
    "trumpet",
]
SMALL_HELD_OUT = ("carrot", "cow face", "dog face", "sailboat")
CONCEPTS = 64  # whose true drawings are compared with pictures


@dataclass(frozen=True)
class StyleFolder:
    """Where the images of a style lie.

    concepts, captions, drawings: of held-out concepts; RGB [64, 64] images.
    """

    name: str
    train: Path
    held_out: Path
    concepts: Sequence[str]
    captions: Sequence[str]
    drawings: Sequence[Image.Image]


def style_folder(name: str, data: Path, work: Path, taught: Sequence[str]) -> StyleFolder:
    """Write the images of a style below `work`.

    Args:
        data: the folder of `emoji64.npz` and `meta.json`.
        taught: the concepts that the embedded model draws.

    Raises:
        ValueError: no such style, or too few drawings.
    """
    if name not in FOLDERS:
        raise ValueError(f"no folder {name!r}; there are {', '.join(FOLDERS)}")
    train, held_out = choose("twemoji" if name == SMALL else name, data, taught)
    if name != SMALL:
        paths = [write_images(work / "images" / name, part) for part in (train, held_out)]
        return StyleFolder(name, paths[0], paths[1], *_compared(held_out, held_out.captions))
    small = write_small(work / "images" / name, data)
    return StyleFolder(name, *small, *_compared(held_out, held_out.names, SMALL_NAMES))


def write_small(parent: Path, data: Path) -> tuple[Path, Path]:
    """The 24 drawings, in folders to train on and to hold out: PNG files with a caption file beside
    each, and no word of style.

    Raises:
        ValueError: a drawing is missing.
    """
    known = load_drawings(data, {"twemoji": ""}, SMALL_NAMES)
    missing = set(SMALL_NAMES) - set(known.names)
    if missing:
        raise ValueError(f"no drawings of {sorted(missing)} in {data}; 24 are needed")
    digest = hashlib.sha256(known.images.numpy().tobytes()).hexdigest()[:12]
    train, held_out = parent / digest / "train", parent / digest / "held_out"
    for name in SMALL_NAMES:
        folder = held_out if name in SMALL_HELD_OUT else train
        folder.mkdir(parents=True, exist_ok=True)
        stem = folder / name.replace(" ", "_")
        _picture(known.images[known.names.index(name)]).save(stem.with_suffix(".png"))
        stem.with_suffix(".txt").write_text(name)
    return train, held_out


def _compared(
    drawings: Drawings, captions: Sequence[str], without: Sequence[str] = ()
) -> tuple[list[str], list[str], list[Image.Image]]:
    """Names, captions and drawings of `CONCEPTS` concepts, evenly from the list."""
    places = [at for at, name in enumerate(drawings.names) if name not in without]
    if len(places) < CONCEPTS:
        raise ValueError(f"{len(places)} held-out drawings, {CONCEPTS} are needed")
    chosen = [places[index * len(places) // CONCEPTS] for index in range(CONCEPTS)]
    return (
        [drawings.names[at] for at in chosen],
        [captions[at] for at in chosen],
        [_picture(drawings.images[at]) for at in chosen],
    )


def _picture(pixels: Tensor) -> Image.Image:
    """From uint8 [3, H, W]."""
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def choose(style: str, data: Path, concepts: Sequence[str]) -> tuple[Drawings, Drawings]:
    """Drawings to train on and to hold out: concepts in a fixed random order, no picture twice.

    The order of the concepts is that of their names, so neither the archive's order nor a style
    changes who is held out.

    Raises:
        ValueError: too few drawings.
    """
    known = load_drawings(data, {style: STYLE_WORDS[style]}, sorted(concepts))
    place = {name: index for index, name in enumerate(known.names)}
    names = sorted(place)
    seen: set[bytes] = set()
    chosen: list[str] = []
    for index in np.random.Generator(np.random.Philox(0)).permutation(len(names)):
        picture = hashlib.sha256(known.images[place[names[index]]].numpy().tobytes()).digest()
        if picture not in seen:
            seen.add(picture)
            chosen.append(names[index])
    if len(chosen) < TRAIN + HELD_OUT:
        raise ValueError(
            f"{len(chosen)} different drawings of {style} in {data}, {TRAIN + HELD_OUT} are needed"
        )

    def part(wanted: list[str]) -> Drawings:
        images = torch.stack([known.images[place[name]] for name in wanted])
        return Drawings(images, [caption_of(name, STYLE_WORDS[style]) for name in wanted], wanted)

    return part(sorted(chosen[:TRAIN])), part(sorted(chosen[TRAIN : TRAIN + HELD_OUT]))


def write_images(folder: Path, drawings: Drawings) -> Path:
    """PNG files and metadata.jsonl, as a user's style folder has them, below `folder` in one named
    by the content.
    """
    content = repr(
        (drawings.captions, hashlib.sha256(drawings.images.numpy().tobytes()).hexdigest())
    )
    folder = folder / hashlib.sha256(content.encode()).hexdigest()[:12]
    if (folder / METADATA_NAME).exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for image, name, caption in zip(
        drawings.images, drawings.names, drawings.captions, strict=True
    ):
        file = "".join(letter if letter.isalnum() else "_" for letter in name.lower()) + ".png"
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / file)
        lines.append(json.dumps({"file_name": file, "text": caption}) + "\n")
    # last, so that a folder with it is whole
    write_whole(folder / METADATA_NAME, "".join(lines).encode())
    return folder
