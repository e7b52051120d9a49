"""Look at a denoiser while it learns: at each checkpoint a loss on fixed noise and a grid of
drawings.

The grid needs no autoencoder (see patches.py), so its drawings are coarse."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.tiny.lessons import Lessons
from benchmarks.tiny.patches import PatchBasis
from benchmarks.tiny.pipeline import TextToVelocity

SUBJECTS = ("red apple", "panda", "guitar", "snowman", "gorilla", "dagger", "bacon", "lotus")
WORDS = (
    *("noto style", "flat style", "twemoji style", "", "noto style, sepia"),
    *("flat style, night colours", "twemoji style, dark background sketch", "pink monochrome"),
    *("sticker on purple", "outlined on grey"),
)
STEPS, GUIDANCE, SHIFT = 16, 2.0, 3.0
MEASURED = 256


def sample(model: TextToVelocity, prompts: Sequence[str], noise: Tensor) -> Tensor:
    """Scaled latents by Euler's method along the guided velocity; noise [N, 16, 8, 8]."""
    even = torch.linspace(1, 0, STEPS + 1)
    sigmas = SHIFT * even / (1 + (SHIFT - 1) * even)
    ids = model.tokenize([*prompts, *[""] * len(prompts)])
    latents = noise
    for sigma, following in pairwise(sigmas):
        levels = sigma.expand(2 * len(noise))
        asked, empty = model(torch.cat([latents, latents]), levels, *ids).float().chunk(2)
        latents = latents + (following - sigma) * (empty + GUIDANCE * (asked - empty))
    return latents


def as_grid(images: Tensor, columns: int) -> Image.Image:
    """A sheet of images [N, 3, H, W] in [-1, 1], row by row."""
    rows = [torch.cat(list(row), dim=2) for row in images.split(columns)]
    pixels = ((torch.cat(rows, dim=1) + 1) * 127.5).round().clamp(0, 255).byte()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy().astype(np.uint8))


@dataclass(frozen=True)
class Look:
    """Callable at a checkpoint: writes `<work>/grids/<step>.png`, and a line to
    `<work>/denoiser.log`.
    """

    model: TextToVelocity
    lessons: Lessons
    basis: PatchBasis
    work: Path

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")  # other batch sizes would be compiled anew
    def __call__(self, step: int) -> None:
        line = f"step {step}: loss {self.loss():.4f} on fixed noise"
        with (self.work / "denoiser.log").open("a") as log:
            log.write(line + "\n")
        print(f"\n{line}", flush=True)
        folder = self.work / "grids"
        folder.mkdir(exist_ok=True)
        as_grid(self.drawings(), len(SUBJECTS)).save(folder / f"{step:06d}.png")

    def drawings(self) -> Tensor:
        """[rows x subjects, 3, 64, 64] in [-1, 1]; a row is one of `WORDS`."""
        prompts = [f"{name}, {words}" if words else name for words in WORDS for name in SUBJECTS]
        generator = torch.Generator().manual_seed(7)
        noise = torch.randn(len(prompts), *self.lessons.latents.shape[2:], generator=generator)
        return self.basis.images(sample(self.model, prompts, noise))

    def loss(self) -> float:
        """Mean over noise levels that are evenly spaced, always on the same drawings and noise."""
        generator = torch.Generator().manual_seed(1)
        clean, captions = self.lessons.draw(MEASURED, generator)
        noise = torch.randn(clean.shape, generator=generator)
        sigma = (torch.randperm(MEASURED, generator=generator) + 0.5) / MEASURED
        at = sigma.view(-1, 1, 1, 1)
        parts = zip(
            ((1 - at) * clean + at * noise).split(64),
            sigma.split(64),
            *(ids.split(64) for ids in self.model.tokenize(captions)),
            strict=True,
        )
        velocity = torch.cat([self.model(*part) for part in parts])
        return F.mse_loss(velocity.float(), noise - clean).item()
