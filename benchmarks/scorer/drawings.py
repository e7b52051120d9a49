"""The drawings that the embedded scorer learns from: every concept in five styles, some concepts
and one style kept out.

Only drawings whose licence lets the weights ship are trained on (Noto Apache-2.0, Fluent MIT,
Twemoji CC-BY 4.0 with attribution). OpenMoji (CC-BY-SA) is the style that it never saw, and
measures it."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.tiny.lessons import knowledge

# Style in the archive -> the words that name it in a caption; three are the embedded model's.
STYLES = {
    "noto": "noto style",
    "fluent_flat": "flat style",
    "fluent3d": "3d style",
    "fluent_mono": "black and white style",
    "twemoji": "twemoji style",
}
HELD_OUT_STYLE = "openmoji"
UNSEEN = 200


@dataclass(frozen=True)
class Concepts:
    """images uint8 [styles, concepts, 3, 64, 64], usable bool [styles, concepts]; names and tags
    one per concept.
    """

    images: Tensor
    usable: Tensor
    names: list[str]
    tags: list[list[str]]

    def __len__(self) -> int:
        return len(self.names)

    def part(self, rows: list[int]) -> "Concepts":
        return Concepts(
            self.images[:, rows],
            self.usable[:, rows],
            [self.names[i] for i in rows],
            [self.tags[i] for i in rows],
        )


def load_concepts(folder: Path, styles: list[str]) -> Concepts:
    """Every concept of the archive once, in each of `styles`."""
    meta = json.loads((folder / "meta.json").read_text())
    archive = np.load(folder / "emoji64.npz", allow_pickle=False)
    rows = list(
        {entry["name"]: index for index, entry in reversed(list(enumerate(meta)))}.values()
    )[::-1]
    pixels = np.stack([archive[f"img_{style}"][rows] for style in styles])
    usable = np.stack([archive[f"ok_{style}"][rows] for style in styles])
    images = torch.from_numpy(pixels).permute(0, 1, 4, 2, 3).contiguous()
    names = [meta[row]["name"] for row in rows]
    return Concepts(
        images, torch.from_numpy(usable), names, [meta[row]["tags"].split(", ") for row in rows]
    )


def split(names: list[str], seed: int = 0) -> tuple[list[int], list[int]]:
    """Positions of the concepts to learn and of those kept out; what the embedded model is taught
    is always learnt.
    """
    drawn = set(knowledge().concepts)
    free = [index for index, name in enumerate(names) if name not in drawn]
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(free))
    unseen = {free[index] for index in order[:UNSEEN]}
    return [index for index in range(len(names)) if index not in unseen], sorted(unseen)
