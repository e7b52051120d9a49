"""Stage one: the autoencoder, on every Noto and Fluent flat drawing, recoloured at random so that
it also carries styles that the pair does not have (black and white, other palettes).

Left to itself a small autoencoder learns outlines long before colours. So the latents are not
learned: they are the first 16 principal components of 8x8 patches, known in closed form. The
encoder is taught to output them, the decoder to draw from them with its wider view, and the
denoiser can be trained on them at the same time."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from benchmarks.tiny.architecture import (
    LATENT_CHANNELS,
    LATENT_SCALE,
    LATENT_SHIFT,
    PATCH,
    build_vae,
)
from benchmarks.tiny.drawings import load_drawings, taught_concepts, taught_styles
from benchmarks.tiny.training import fast_cpu, train_resumable

# a posterior deviation of 0.08: trainers that sample latents see nearly the mean
POSTERIOR_LOGVAR = -5.0
DECODER_NOISE = 0.15  # scaled latents from a denoiser are never exact
GREY = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)


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


def fit_basis(images: Tensor) -> PatchBasis:
    """Principal components of the patches of uint8 images, half whitened: the weak ones carry edges
    and must not drown in noise.
    """
    rows = (
        F.unfold(images.float() / 127.5 - 1, PATCH, stride=PATCH)
        .transpose(1, 2)
        .flatten(0, 1)
        .double()
    )
    mean = rows.mean(0)
    values, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    values, vectors = values.flip(0)[:LATENT_CHANNELS], vectors.flip(1)[:, :LATENT_CHANNELS]
    strongest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    vectors = vectors * strongest.sign()  # eigenvectors have no sign of their own
    deviation = values.sqrt()
    matrix = vectors / deviation.sqrt() / deviation.mean().sqrt()
    return PatchBasis(mean.float(), matrix.float())


def to_vae_units(scaled: Tensor) -> Tensor:
    return scaled / LATENT_SCALE + LATENT_SHIFT


def recolour(images: Tensor, generator: torch.Generator) -> Tensor:
    """Half of a batch [B, 3, H, W] in [-1, 1] unchanged; the rest with channels permuted, greyed,
    or in black on white.
    """
    out = images.clone()
    for i in range(len(images)):
        kind = int(torch.randint(8, (1,), generator=generator))
        if kind == 4:
            out[i] = out[i, torch.randperm(3, generator=generator)]
        elif kind == 5:
            out[i] = (out[i : i + 1] * GREY).sum(1).expand(3, -1, -1)
        elif kind == 6:
            threshold = float(torch.rand(1, generator=generator)) - 0.3
            out[i] = (
                (12 * ((out[i : i + 1] * GREY).sum(1) - threshold)).clamp(-1, 1).expand(3, -1, -1)
            )
        elif kind == 7:
            strength = 0.5 + float(torch.rand(1, generator=generator))
            out[i] = (1 - (1 - out[i]) * strength).clamp(-1, 1)
        if torch.rand(1, generator=generator) < 0.5:
            out[i] = out[i].flip(-1)
    shift = torch.randint(-3, 4, (2,), generator=generator)
    return torch.roll(out, (int(shift[0]), int(shift[1])), dims=(2, 3))


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 and L2 on pixels, L1 on their differences: flat drawings live by their edges."""
    loss = F.l1_loss(output, target) + F.mse_loss(output, target)
    for dim in (2, 3):
        loss = loss + 0.5 * F.l1_loss(output.diff(dim=dim), target.diff(dim=dim))
    return loss


def train_vae(data: Path, work: Path, *, steps: int, batch: int, seed: int = 0) -> AutoencoderKL:
    torch.manual_seed(seed)
    vae = build_vae()
    taught = load_drawings(data, taught_styles(), taught_concepts())
    every = load_drawings(data, taught_styles())
    basis = fit_basis(every.images)
    pool = torch.cat([taught.images, taught.images, every.images])

    def loss_of_step(step: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(pool), (batch,), generator=generator)
        images = recolour(pool[chosen].float() / 127.5 - 1, generator)
        exact = to_vae_units(basis.latents(images))
        noise = torch.randn(exact.shape, generator=generator) * DECODER_NOISE / LATENT_SCALE
        noise = noise * torch.rand((batch, 1, 1, 1), generator=generator)
        with fast_cpu():
            posterior = vae.encode(images).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            half = batch // 2
            source = torch.cat([mean[:half], (exact + noise)[half:]])
            output = vae.decode(source).sample.float()
        to_basis = F.mse_loss(mean, exact) + 0.01 * F.mse_loss(
            logvar, torch.full_like(logvar, POSTERIOR_LOGVAR)
        )
        return reconstruction_loss(output, images) + to_basis

    checkpoint = work / "vae.safetensors"
    train_resumable(
        vae,
        loss_of_step,
        checkpoint=checkpoint,
        total_steps=steps,
        peak_lr=1.5e-3,
        ema_decay=0.995,
        seed=seed,
    )
    return vae
