"""Make the examples of a step from encoded pictures: those of the style and those of the prior."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qzo_diffusion.config.style import Config
from qzo_diffusion.diffusion.flow_matching import Batch, sample_sigmas
from qzo_diffusion.diffusion.sd3 import EncodedPrompt, stack_prompts

CPU = torch.device("cpu")


def make_batch(
    prompts: dict[str, EncodedPrompt],
    captions: Sequence[str],
    latents: Tensor,
    noise: Tensor,
    sigma: Tensor,
    device: torch.device = CPU,
) -> Batch:
    embeds, pooled = stack_prompts([prompts[caption] for caption in captions])
    return Batch(latents, noise, sigma, embeds, pooled).to(device)


def training_levels(config: Config, count: int, generator: torch.Generator) -> Tensor:
    """Draw noise levels [count] as `sigma` says."""
    levels = config.sigma
    return sample_sigmas(
        count,
        generator,
        distribution=levels.distribution,
        shift=levels.shift,
        low=levels.min,
        high=levels.max,
    )
