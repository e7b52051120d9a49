"""Make the examples of a step from encoded pictures: those of the style and those of the prior."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from qzo_diffusion.config.style import Config
from qzo_diffusion.diffusion.encoded_prompt import EncodedPrompt, stack_prompts
from qzo_diffusion.diffusion.flow_matching import Batch, sample_sigmas
from qzo_diffusion.diffusion.objectives import Objective

CPU = torch.device("cpu")


class Texts(Protocol):
    """Encoded prompts by their text, and the objective of the model that takes them."""

    @property
    def prompts(self) -> Mapping[str, EncodedPrompt]: ...

    @property
    def objective(self) -> Objective: ...


def make_batch(
    encoded: Texts,
    captions: Sequence[str],
    latents: Tensor,
    noise: Tensor,
    sigma: Tensor,
    device: torch.device = CPU,
    weight: Tensor | None = None,
) -> Batch:
    embeds, pooled = stack_prompts([encoded.prompts[caption] for caption in captions])
    parts = (latents, noise, sigma, embeds, pooled)
    return Batch(*parts, weight=weight, objective=encoded.objective).to(device)


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
