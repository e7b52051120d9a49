"""The drawings that the embedded model learns from, and their captions.

`emoji64.npz` holds one array `img_<style>` per style, uint8 [concepts, 64, 64, 3] on white, and
`ok_<style>` bool; `meta.json` beside it names the concepts. Only Noto (Apache-2.0), Fluent flat
(MIT) and Twemoji (CC-BY 4.0) drawings are trained on, so that the weights may ship.

Two files list what is taught: the one beside the shipped weights says what they know, the one in
this folder what the next training teaches."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CONCEPTS_FILE = Path(__file__).parents[2] / "qzo_diffusion/models/tiny/concepts.json"
LESSONS_FILE = Path(__file__).with_name("concepts.json")


@dataclass(frozen=True)
class Drawings:
    """`images` uint8 [N, 3, 64, 64]; `captions` one per image; `names` the concept of each
    image.
    """

    images: Tensor
    captions: list[str]
    names: list[str]

    def __len__(self) -> int:
        return len(self.captions)


@dataclass(frozen=True)
class Knowledge:
    """What a model is taught.

    styles: key in the archive -> the words that name it in a caption. held_out: concepts that are
    taught, and that no folder of a style to tune may hold. treatments: names, see treatments.py.
    """

    concepts: list[str]
    styles: dict[str, str]
    held_out: list[str]
    treatments: list[str]


def read_knowledge(file: Path) -> Knowledge:
    facts = json.loads(file.read_text())
    return Knowledge(
        facts["concepts"], facts["styles"], facts.get("held_out", []), facts.get("treatments", [])
    )


def taught_concepts() -> list[str]:
    """Of the shipped weights."""
    return read_knowledge(CONCEPTS_FILE).concepts


def taught_styles() -> dict[str, str]:
    """Of the shipped weights: style key in the archive -> the words that name it in a caption."""
    return read_knowledge(CONCEPTS_FILE).styles


def caption_of(name: str, *words: str) -> str:
    return ", ".join([name, *words])


def load_drawings(folder: Path, styles: dict[str, str], names: list[str] | None = None) -> Drawings:
    """Every drawing of `names` (all concepts when None) in every style, style by style."""
    meta = json.loads((folder / "meta.json").read_text())
    archive = np.load(folder / "emoji64.npz", allow_pickle=False)
    wanted = None if names is None else set(names)
    images, captions, concepts = [], [], []
    for style, words in styles.items():
        pixels, usable = archive[f"img_{style}"], archive[f"ok_{style}"]
        seen: set[str] = set()
        for index, entry in enumerate(meta):
            name = entry["name"]
            if not usable[index] or name in seen or (wanted is not None and name not in wanted):
                continue
            seen.add(name)
            images.append(pixels[index])
            captions.append(caption_of(name, words))
            concepts.append(name)
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return Drawings(stacked, captions, concepts)
