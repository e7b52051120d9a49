"""Which true drawing is a prompted one nearest to? In the autoencoder's latents.

Three questions: among 64 concepts of its style (does it show the subject), among the same subject
in the taught styles (does the style's word work), among the same drawing with each treatment (does
the treatment's name work). All drawings were trained on."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from benchmarks.tiny.drawings import Drawings, Knowledge, load_drawings
from benchmarks.tiny.pipeline import scaled_latents
from benchmarks.tiny.treatments import treat

OF_A_TREATMENT = 16  # prompts


@dataclass(frozen=True)
class Draw:
    """pictures: prompts -> uint8 images [N, 3, 64, 64]."""

    vae: AutoencoderKL
    pictures: Callable[[Sequence[str]], Tensor]

    def latents(self, images: Tensor) -> Tensor:
        """[N, 1024] of uint8 images."""
        return scaled_latents(self.vae, images).flatten(1)

    def drawn(self, prompts: Sequence[str]) -> Tensor:
        return self.latents(self.pictures(prompts))


def chosen(count: int, among: int, seed: int = 20) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(among, generator=generator)[:count].tolist()


def shares(hits: dict[str, list[bool]]) -> dict[str, dict[str, float | int]]:
    return {
        word: {"share": round(sum(some) / len(some), 4), "n": len(some)}
        for word, some in hits.items()
    }


def rivals(
    drawings: Drawings, index: int, generator: torch.Generator, count: int = 63
) -> list[int]:
    """Other concepts in the same style."""
    style = drawings.captions[index].removeprefix(drawings.names[index])
    others = [
        i
        for i in range(len(drawings))
        if i != index and drawings.captions[i].removeprefix(drawings.names[i]) == style
    ]
    order = torch.randperm(len(others), generator=generator)[:count]
    return [others[int(i)] for i in order]


def top1_of_64(draws: Draw, drawings: Drawings, count: int) -> dict[str, Any]:
    """How often the prompted drawing is the nearest of 64; 63 are other concepts of its style."""
    generator = torch.Generator().manual_seed(20)
    rows = chosen(count, len(drawings))
    drawn = draws.drawn([drawings.captions[row] for row in rows])
    truth = draws.latents(drawings.images)
    hits: dict[str, list[bool]] = defaultdict(list)
    for picture, row in zip(drawn, rows, strict=True):
        candidates = [row, *rivals(drawings, row, generator)]
        nearest = (truth[candidates] - picture).norm(dim=1).argmin()
        hits[drawings.captions[row].rpartition(", ")[2]].append(int(nearest) == 0)
    every = [hit for some in hits.values() for hit in some]
    errors = (truth[rows] - drawn).square().mean(1).sqrt()  # scaled latents have deviation 1
    return {
        "top1_of_64": round(sum(every) / len(every), 4),
        "n": len(every),
        "latent_rms_error": round(errors.mean().item(), 4),
        "per_style": shares(hits),
    }


def nearest_style(draws: Draw, data: Path, known: Knowledge, count: int) -> dict[str, Any]:
    """For each style's word, how often the picture is nearest to that style's drawing of it."""
    styles = [load_drawings(data, {key: key}, known.concepts) for key in known.styles]
    names = [styles[0].names[row] for row in chosen(count // len(styles), len(styles[0]))]
    truth = torch.stack(
        [draws.latents(_of(drawings, names)) for drawings in styles], dim=1
    )  # [names, styles, 1024]
    hits = {}
    for place, words in enumerate(known.styles.values()):
        drawn = draws.drawn([f"{name}, {words}" for name in names])
        nearest = (truth - drawn.unsqueeze(1)).norm(dim=2).argmin(1)
        hits[words] = (nearest == place).tolist()
    return shares(hits)


def _of(drawings: Drawings, names: Sequence[str]) -> Tensor:
    place = {name: row for row, name in enumerate(drawings.names)}
    return drawings.images[[place[name] for name in names]]


def nearest_treatment(
    draws: Draw, drawings: Drawings, treatments: Sequence[str], count: int = OF_A_TREATMENT
) -> dict[str, Any]:
    """For each treatment's name, how often the picture is nearest to the drawing treated so, among
    all treatments of that drawing and the untreated one.
    """
    rows = chosen(count, len(drawings))
    images = drawings.images[rows]
    versions = [images, *(treat(name, images) for name in treatments)]
    truth = torch.stack([draws.latents(version) for version in versions], dim=1)
    hits = {}
    for place, name in enumerate(treatments, start=1):
        drawn = draws.drawn([f"{drawings.captions[row]}, {name}" for row in rows])
        nearest = (truth - drawn.unsqueeze(1)).norm(dim=2).argmin(1)
        hits[name] = (nearest == place).tolist()
    return shares(hits)
