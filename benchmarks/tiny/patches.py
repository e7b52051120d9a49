"""The latents of the embedded model: the first 16 principal components of 8x8 patches.

They are known in closed form, so autoencoder and denoiser can be trained at the same time, and the
denoiser's drawings can be looked at without the autoencoder."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.tiny.architecture import LATENT_CHANNELS, PATCH
from benchmarks.tiny.drawings import load_drawings

# the drawings that the components are fitted to; fixed, so that weights can be trained on further
FITTED_STYLES = {"noto": "noto style", "fluent_flat": "flat style"}


@dataclass(frozen=True)
class PatchBasis:
    """`matrix` [192, 16] maps centred patches to latents of about unit deviation; `mean` [192]."""

    mean: Tensor
    matrix: Tensor

    def latents(self, images: Tensor) -> Tensor:
        """Scaled latents [B, 16, H/8, W/8] of images [B, 3, H, W] in [-1, 1]."""
        rows = F.unfold(images, PATCH, stride=PATCH).transpose(1, 2) - self.mean
        grid = images.shape[-2] // PATCH, images.shape[-1] // PATCH
        return (rows @ self.matrix).transpose(1, 2).unflatten(-1, grid).contiguous()

    def images(self, latents: Tensor) -> Tensor:
        """Images [B, 3, 8h, 8w] in [-1, 1] nearest to scaled latents [B, 16, h, w]: coarse, since
        16 numbers stand for 192.
        """
        rows = latents.flatten(2).transpose(1, 2) @ torch.linalg.pinv(self.matrix) + self.mean
        size = [PATCH * side for side in latents.shape[-2:]]
        return F.fold(rows.transpose(1, 2), size, PATCH, stride=PATCH).clamp(-1, 1)


def fit_basis(data: Path) -> PatchBasis:
    """Principal components of the drawings' patches, half whitened: the weak ones carry edges and
    must not drown in noise.
    """
    images = load_drawings(data, FITTED_STYLES).images
    patches = F.unfold(images.float() / 127.5 - 1, PATCH, stride=PATCH)
    rows = patches.transpose(1, 2).flatten(0, 1).double()
    mean = rows.mean(0)
    values, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    values, vectors = values.flip(0)[:LATENT_CHANNELS], vectors.flip(1)[:, :LATENT_CHANNELS]
    strongest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    vectors = vectors * strongest.sign()  # eigenvectors have no sign of their own
    deviation = values.sqrt()
    matrix = vectors / deviation.sqrt() / deviation.mean().sqrt()
    return PatchBasis(mean.float(), matrix.float())
