"""Check and load the VAE of a pipeline, and free its encoder."""

import gc
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.diffusion import empty
from qzo_diffusion.diffusion.families.family import Family
from qzo_diffusion.quant.config_file import read_config
from qzo_diffusion.quant.stream import fill_
from qzo_diffusion.quant.weights import read_entries

CLASS = "AutoencoderKL"


def read_vae_config(file: Path, family: Family) -> dict[str, Any]:
    """Read the config of a VAE with the factors that the family's latents have.

    Raises:
        ModelError: it describes another model.
    """
    config = read_config(file)
    factors = family.vae_factors
    wrong = next((key for key in factors if not _finite(config.get(key))), "")
    channels = config.get("block_out_channels")
    if not isinstance(channels, list) or not channels or not all(map(_positive, channels)):
        wrong = "block_out_channels"
    if config.get("scaling_factor") == 0:
        wrong = "scaling_factor"
    if not _positive(config.get("latent_channels")):
        wrong = "latent_channels"
    if config.get("_class_name", CLASS) != CLASS:
        wrong = "_class_name"
    if wrong:
        raise ModelError(
            f"{file} says {wrong} = {config.get(wrong)!r}",
            f"the VAE of {family.title}: {CLASS} with {' and '.join(factors)}",
            f"put the vae/ of a model of {family.title} there, or download the model again",
        )
    return config


def empty_vae(config: Mapping[str, Any]) -> nn.Module:
    """Build the model on the meta device. Raises ModelError for a config that diffusers refuses."""
    from diffusers import AutoencoderKL

    return empty.from_config(
        AutoencoderKL,
        config,
        "VAE",
        "the config of a VAE",
        "download the model again",
    )


def load_vae(
    folder: Path,
    family: Family,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    tile: int | None = None,
) -> Any:
    """Load the VAE of a pipeline.

    Args:
        tile: images larger than so many pixels a side are encoded and decoded in overlapping
            squares of that size.

    Raises:
        ModelError: its config is damaged or of another VAE, or tensors are missing.
    """
    vae: Any = empty_vae(read_vae_config(folder / "vae" / "config.json", family))
    fill_(vae, read_entries(folder / "vae"), None, dtype=dtype, device=device)
    if tile is not None:
        vae.enable_tiling()
        vae.tile_sample_min_size = tile
        vae.tile_latent_min_size = tile // reduction(vae.config)
    return vae


def reduction(config: Mapping[str, Any]) -> int:
    """Return the number of pixels along a side of one latent."""
    return int(2 ** (len(config["block_out_channels"]) - 1))


def image_encoder(vae: Any) -> Callable[[Tensor], Tensor]:
    """Return a function of images [B, 3, H, W] in [-1, 1] that gives latents [B, C, h, w] fp32.

    Latents are `(z - shift_factor) · scaling_factor` of the mean z.
    """

    @torch.no_grad()
    def encode(images: Tensor) -> Tensor:
        z = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mean
        return ((z - _shift(vae)) * vae.config.scaling_factor).float().cpu()

    return encode


def pixels_of(vae: Any, latents: Tensor) -> Tensor:
    """Return the picture [B, 3, H, W] fp32 of latents [B, C, h, w], the inverse of `image_encoder`
    up to the VAE's own loss.
    """
    z = latents.float() / vae.config.scaling_factor + _shift(vae)
    pixels: Tensor = vae.decode(z.to(vae.device, vae.dtype)).sample
    return pixels.float()


def _shift(vae: Any) -> float:
    return float(vae.config.shift_factor or 0.0)


def drop_encoder_(vae: Any) -> None:
    """Free the encoder, which training and sampling do not need."""
    vae.encoder = None
    gc.collect()


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _positive(value: Any) -> bool:
    return type(value) is int and value > 0
