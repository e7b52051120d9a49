"""Draw the pictures of a batch with the transformer as it is when called: under a probe, each
picture by its own factors.

With guidance every picture is two rows of a forward pass. Probes give equal runs of neighbouring
rows the same factors, so the two rows of a picture are neighbours.
"""

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from qzo_diffusion.diffusion.decoding import decoded
from qzo_diffusion.diffusion.flow_matching import PATCH
from qzo_diffusion.rewards.pictures import PictureBatch


class Drawer:
    """Draw pictures in few steps of the model's own scheduler.

    Args:
        transformer, scheduler, vae: parts of an SD3 pipeline. The VAE needs only its decoder.
        steps: sampling steps.
        guidance: scale of classifier-free guidance; up to 1 there is none, and a step is one row
            of a forward pass for each picture.
        decoded_at_once: pictures that the VAE decodes together.
    """

    def __init__(
        self,
        transformer: Any,
        scheduler: Any,
        vae: Any,
        *,
        steps: int,
        guidance: float,
        decoded_at_once: int,
        dtype: torch.dtype,
    ) -> None:
        self._transformer, self._scheduler, self._vae = transformer, scheduler, vae
        self._steps, self._guidance, self._dtype = steps, guidance, dtype
        self._decoded_at_once = decoded_at_once

    def pictures(self, batch: PictureBatch) -> list[Image.Image]:
        """Return an RGB picture for each example."""
        parts = self.latents(batch).split(self._decoded_at_once)
        return [picture for part in parts for picture in decoded(self._vae, part)]

    @torch.no_grad()
    def latents(self, batch: PictureBatch) -> Tensor:
        """Return the latents of the pictures, [B, C, h, w] fp32."""
        latents, guided = batch.noise, self._guidance > 1
        embeds = _rows(batch.negative_embeds, batch.embeds, guided).to(self._dtype)
        pooled = _rows(batch.negative_pooled, batch.pooled, guided).to(self._dtype)
        for timestep in self._timesteps(latents):
            seen = latents.repeat_interleave(2, 0) if guided else latents
            velocity = self._transformer(
                hidden_states=seen.to(self._dtype),
                timestep=timestep.expand(len(seen)),
                encoder_hidden_states=embeds,
                pooled_projections=pooled,
                return_dict=False,
            )[0].float()
            if guided:
                without, with_prompt = velocity.unflatten(0, (-1, 2)).unbind(1)
                velocity = without + self._guidance * (with_prompt - without)
            latents = self._scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        return latents

    def _timesteps(self, latents: Tensor) -> Tensor:
        """Set up the scheduler for the pictures' size as SD3's pipeline does."""
        scheduler, options = self._scheduler, {}
        if scheduler.config.get("use_dynamic_shifting"):
            from diffusers.pipelines.stable_diffusion_3 import pipeline_stable_diffusion_3 as sd3

            tokens = latents.shape[-2] // PATCH * (latents.shape[-1] // PATCH)
            sizes = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
            options = {
                "mu": sd3.calculate_shift(tokens, *(scheduler.config[name] for name in sizes))
            }
        scheduler.set_timesteps(self._steps, device=latents.device, **options)
        timesteps: Tensor = scheduler.timesteps
        return timesteps


def _rows(without: Tensor, with_prompt: Tensor, guided: bool) -> Tensor:
    """Return the rows of a forward pass: those of a picture are neighbours."""
    return torch.stack([without, with_prompt], 1).flatten(0, 1) if guided else with_prompt
