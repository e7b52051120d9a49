"""Decode latents into pictures."""

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from qzo_diffusion.diffusion.vae import pixels_of


@torch.no_grad()
def decoded(vae: Any, latents: Tensor) -> list[Image.Image]:
    """Return the RGB pictures of latents [B, C, h, w], shifted and scaled as in training.

    Args:
        vae: needs only its decoder, in any dtype and on any device.
    """
    from diffusers.image_processor import VaeImageProcessor

    pixels = pixels_of(vae, latents)
    pictures: list[Image.Image] = VaeImageProcessor().postprocess(pixels, output_type="pil")
    return pictures
