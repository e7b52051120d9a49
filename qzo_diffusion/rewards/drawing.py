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
from qzo_diffusion.diffusion.encoded_prompt import equally_long
from qzo_diffusion.diffusion.families.family import Family
from qzo_diffusion.diffusion.flow_matching import PATCH
from qzo_diffusion.rewards.pictures import PictureBatch


class Drawer:
    """Draw pictures in few steps of the model's own scheduler.

    Args:
        family: that the model is of.
        transformer, scheduler, vae: parts of its pipeline. The VAE needs only its decoder.
        steps: sampling steps.
        guidance: scale of classifier-free guidance; up to the family's `unguided` there is none,
            and a step is one row of a forward pass for each picture.
        decoded_at_once: pictures that the VAE decodes together.
    """

    def __init__(
        self,
        family: Family,
        transformer: Any,
        scheduler: Any,
        vae: Any,
        *,
        steps: int,
        guidance: float,
        decoded_at_once: int,
        dtype: torch.dtype,
    ) -> None:
        self._family, self._transformer = family, transformer
        self._scheduler, self._vae = scheduler, vae
        self._steps, self._guidance, self._dtype = steps, guidance, dtype
        self._decoded_at_once = decoded_at_once

    def pictures(self, batch: PictureBatch) -> list[Image.Image]:
        """Return an RGB picture for each example."""
        parts = self.latents(batch).split(self._decoded_at_once)
        return [picture for part in parts for picture in decoded(self._vae, part)]

    @torch.no_grad()
    def latents(self, batch: PictureBatch) -> Tensor:
        """Return the latents of the pictures, [B, C, h, w] fp32."""
        sampling, own = self._family.sampling, self._family.denoiser
        guided, scheduler = sampling.passes(self._guidance) > 1, self._scheduler
        scale = self._guidance - (sampling.unguided - 1)
        negative_embeds, embeds = equally_long((batch.negative_embeds, batch.embeds))
        embeds = _rows(negative_embeds, embeds, guided)
        pooled = _rows(batch.negative_pooled, batch.pooled, guided)
        given = None if sampling.twice else self._guidance
        timesteps = self._timesteps(batch.noise)
        latents = batch.noise * getattr(scheduler, "init_noise_sigma", 1.0)
        scaled = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
        for timestep in timesteps:
            seen = scaled(latents.repeat_interleave(2, 0) if guided else latents, timestep)
            time = timestep.expand(len(seen))
            prediction = own.call(
                self._transformer, seen, time, (embeds, pooled), self._dtype, given
            )
            if guided:
                without, with_prompt = prediction.unflatten(0, (-1, 2)).unbind(1)
                prediction = sampling.guided(without, with_prompt, scale)
            latents = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
        return latents

    def _timesteps(self, latents: Tensor) -> Tensor:
        """Set up the scheduler for the pictures' size as the family's pipeline does."""
        tokens = latents.shape[-2] // PATCH * (latents.shape[-1] // PATCH)
        self._family.sampling.set_times(self._scheduler, self._steps, tokens, latents.device)
        timesteps: Tensor = self._scheduler.timesteps
        return timesteps


def _rows(without: Tensor, with_prompt: Tensor, guided: bool) -> Tensor:
    """Return the rows of a forward pass: those of a picture are neighbours."""
    return torch.stack([without, with_prompt], 1).flatten(0, 1) if guided else with_prompt
