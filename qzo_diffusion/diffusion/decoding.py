"""Decode latents into pictures."""

from typing import Any

import torch
from PIL import Image
from torch import Tensor


@torch.no_grad()
def decoded(vae: Any, latents: Tensor) -> list[Image.Image]:
    """Return the RGB pictures of latents [B, C, h, w], shifted and scaled as in training.

    Args:
        vae: needs only its decoder, in any dtype and on any device.
    """
    from diffusers.image_processor import VaeImageProcessor

    z = latents.float() / vae.config.scaling_factor + vae.config.shift_factor
    pixels = vae.decode(z.to(vae.device, vae.dtype)).sample
    pictures: list[Image.Image] = VaeImageProcessor().postprocess(pixels.float(), output_type="pil")
    return pictures
