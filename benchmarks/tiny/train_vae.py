"""Stage one: the autoencoder, on every drawing of the taught styles, treated and recoloured at
random so that it also carries palettes that nobody drew.

Left to itself a small autoencoder learns outlines long before colours. So the latents are not
learned: the encoder is taught to output the patches' principal components (patches.py), the decoder
to draw from them with its wider view."""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from benchmarks.tiny.architecture import LATENT_SCALE, LATENT_SHIFT, build_vae
from benchmarks.tiny.drawings import load_drawings
from benchmarks.tiny.lessons import knowledge
from benchmarks.tiny.patches import PatchBasis, fit_basis
from benchmarks.tiny.training import Recipe, bf16_is_faster, fast_cpu, train_resumable
from benchmarks.tiny.treatments import TAUGHT, treat

# a posterior deviation of 0.08: trainers that sample latents see nearly the mean
POSTERIOR_LOGVAR = -5.0
DECODER_NOISE = 0.15  # scaled latents from a denoiser are never exact
TREATED_SHARE = 0.4


def to_vae_units(scaled: Tensor) -> Tensor:
    return scaled / LATENT_SCALE + LATENT_SHIFT


def recolour(image: Tensor, generator: torch.Generator) -> Tensor:
    """A drawing [3, H, W] in [-1, 1]: half stay, a quarter get their channels permuted, a quarter
    another strength.
    """
    kind = int(torch.randint(4, (1,), generator=generator))
    if kind == 2:
        return image[torch.randperm(3, generator=generator)]
    if kind == 3:
        strength = 0.5 + float(torch.rand(1, generator=generator))
        return (1 - (1 - image) * strength).clamp(-1, 1)
    return image


def treated(drawing: Tensor, generator: torch.Generator) -> Tensor:
    """A uint8 drawing [3, H, W] in [-1, 1]: with a taught treatment, or recoloured."""
    names = list(TAUGHT)
    which = int(torch.randint(len(names), (1,), generator=generator))
    if torch.rand(1, generator=generator) < TREATED_SHARE:
        return treat(names[which], drawing.unsqueeze(0))[0].float() / 127.5 - 1
    return recolour(drawing.float() / 127.5 - 1, generator)


def draw_images(pool: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """[batch, 3, 64, 64] in [-1, 1], half of them mirrored, all shifted alike by up to three
    pixels.
    """
    rows = torch.randint(len(pool), (batch,), generator=generator)
    images = torch.stack([treated(pool[row], generator) for row in rows])
    mirrored = torch.rand(batch, 1, 1, 1, generator=generator) < 0.5
    images = torch.where(mirrored, images.flip(-1), images)
    down, right = torch.randint(-3, 4, (2,), generator=generator).tolist()
    shifted = torch.roll(images, (down, right), dims=(2, 3))
    return shifted.contiguous(memory_format=torch.channels_last)


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 and L2 on pixels, L1 on their differences: flat drawings live by their edges."""
    loss = F.l1_loss(output, target) + F.mse_loss(output, target)
    for dim in (2, 3):
        loss = loss + 0.5 * F.l1_loss(output.diff(dim=dim), target.diff(dim=dim))
    return loss


def autoencoder_loss(
    vae: AutoencoderKL, basis: PatchBasis, images: Tensor, generator: torch.Generator, bf16: bool
) -> Tensor:
    """Half of the batch is drawn from the encoder's latents, half from noisy exact ones."""
    exact = to_vae_units(basis.latents(images))
    noise = torch.randn(exact.shape, generator=generator) * DECODER_NOISE / LATENT_SCALE
    noise = noise * torch.rand((len(images), 1, 1, 1), generator=generator)
    with fast_cpu(bf16):
        posterior = vae.encode(images).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        half = len(images) // 2
        output = vae.decode(torch.cat([mean[:half], (exact + noise)[half:]])).sample.float()
    to_basis = F.mse_loss(mean, exact) + 0.01 * F.mse_loss(
        logvar, torch.full_like(logvar, POSTERIOR_LOGVAR)
    )
    return reconstruction_loss(output, images) + to_basis


def start(seed: int, begin_from: Path | None) -> AutoencoderKL:
    """A new autoencoder, or that of a pipeline folder of the same shape."""
    torch.manual_seed(seed)
    vae = build_vae()
    if begin_from is not None:
        vae.load_state_dict(AutoencoderKL.from_pretrained(begin_from / "vae").state_dict())
    return vae.to(memory_format=torch.channels_last)  # a third faster


def train_vae(
    data: Path, work: Path, recipe: Recipe, *, batch: int, begin_from: Path | None = None
) -> AutoencoderKL:
    """begin_from: a pipeline folder whose autoencoder has these latents already."""
    vae, basis = start(recipe.seed, begin_from), fit_basis(data)
    pool = load_drawings(data, knowledge().styles).images

    def loss(generator: torch.Generator, bf16: bool) -> Tensor:
        return autoencoder_loss(vae, basis, draw_images(pool, batch, generator), generator, bf16)

    trial = torch.Generator().manual_seed(0)
    bf16 = bf16_is_faster(lambda bf16: loss(trial, bf16))
    train_resumable(
        vae,
        lambda _step, generator: loss(generator, bf16),
        recipe,
        checkpoint=work / "vae.safetensors",
    )
    return vae
