"""Check and load the VAE of a pipeline, and free its encoder."""

import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.diffusion import empty
from qzo_diffusion.diffusion.autoencoders import KINDS, PLAIN, is_finite, kind_of_model
from qzo_diffusion.diffusion.families.family import Family
from qzo_diffusion.quant.config_file import read_config
from qzo_diffusion.quant.stream import fill_
from qzo_diffusion.quant.weights import read_entries


def read_vae_config(file: Path, family: Family) -> dict[str, Any]:
    """Read the config of a VAE with the factors that the family's latents have.

    Raises:
        ModelError: it describes another model.
    """
    config = read_config(file)
    own, factors = family.vae, family.vae_factors
    wrong = [key for key in factors if not is_finite(config.get(key))]
    if config.get("_class_name", own) != own:
        wrong = ["_class_name"]
    for key in wrong or KINDS[own].wrong(config):
        raise ModelError(
            f"{file} says {key} = {config.get(key)!r}",
            f"the VAE of {family.title}: {own} with {' and '.join(factors)}",
            f"put the vae/ of a model of {family.title} there, or download the model again",
        )
    return {"_class_name": own} | config


def empty_vae(config: Mapping[str, Any]) -> nn.Module:
    """Build the model on the meta device. Raises ModelError for a config that diffusers refuses."""
    import diffusers

    return empty.from_config(
        getattr(diffusers, config.get("_class_name", PLAIN)),
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
        kind_of_model(vae).set_tile(vae, tile)
    return vae


def image_encoder(vae: Any) -> Callable[[Tensor], Tensor]:
    """Return a function of images [B, 3, H, W] in [-1, 1] that gives latents [B, C, h, w] fp32,
    without the VAE's own noise.
    """
    kind = kind_of_model(vae)

    @torch.no_grad()
    def encode(images: Tensor) -> Tensor:
        return kind.encoded(vae, images).float().cpu()

    return encode


def pixels_of(vae: Any, latents: Tensor) -> Tensor:
    """Return the picture [B, 3, H, W] fp32 of latents [B, C, h, w], the inverse of `image_encoder`
    up to the VAE's own loss.
    """
    return kind_of_model(vae).decoded(vae, latents.float()).float()


def drop_encoder_(vae: Any) -> None:
    """Free the encoder, which training and sampling do not need."""
    vae.encoder = nn.Identity()  # some kinds count its layers
    gc.collect()
