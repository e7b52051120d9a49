"""The training objective of Stable Diffusion 3.5: rectified flow with plain velocity regression.

    noisy    = (1 - sigma) · latents + sigma · noise    sigma in [0, 1], 1 is pure noise
    velocity = noise - latents                          the target at timestep 1000 · sigma
    loss     = mean over channels and pixels of (prediction - velocity)²    one per example

Noise and sigma are arguments, drawn once a step, so that both forwards of a two-point estimate see
the same ones. The DDPM noising of the paper's released script is a different objective than the one
SD3.5 was trained with, and is not offered."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

SigmaDistribution = Literal["uniform", "logit_normal"]


@dataclass(frozen=True)
class Batch:
    """Everything one evaluation of the loss needs.

    latents [B, C, h, w] fp32 (already shifted and scaled), noise of the same shape, sigma [B] fp32,
    prompt_embeds [B, T, D], pooled [B, P]. regions: how many losses an example has, one for each
    equally long run of its patches."""

    latents: Tensor
    noise: Tensor
    sigma: Tensor
    prompt_embeds: Tensor
    pooled: Tensor
    patch_groups: int = 1

    def __len__(self) -> int:
        return len(self.sigma)

    def part(self, examples: slice) -> "Batch":
        """Some of the examples."""
        return self._with(tensor[examples] for tensor in self._tensors())

    def repeated(self, times: int) -> "Batch":
        """All examples and then all again, so many times."""
        return self._with(torch.cat([tensor] * times) for tensor in self._tensors())

    def to(self, device: torch.device) -> "Batch":
        return self._with(tensor.to(device) for tensor in self._tensors())

    def split(self, size: int) -> list["Batch"]:
        """Micro-batches of at most `size` examples; their losses average to this batch's."""
        parts = [tensor.split(size) for tensor in self._tensors()]
        return [self._with(tensors) for tensors in zip(*parts, strict=True)]

    def _with(self, tensors: Iterable[Tensor]) -> "Batch":
        latents, noise, sigma, prompt_embeds, pooled = tensors
        return Batch(latents, noise, sigma, prompt_embeds, pooled, self.patch_groups)

    def _tensors(self) -> tuple[Tensor, ...]:
        return (self.latents, self.noise, self.sigma, self.prompt_embeds, self.pooled)


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """The time shift of SD3 (arXiv 2403.03206, equation 23): `shift` > 1 moves levels towards pure
    noise, 1 is the identity.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def sample_sigmas(
    count: int,
    generator: torch.Generator,
    *,
    distribution: SigmaDistribution = "uniform",
    shift: float = 1.0,
) -> Tensor:
    """Noise levels [count], stratified: one from each of `count` equal slices of the distribution,
    in random order.

    Stratifying takes most of the variance of sigma out of a batch's loss without changing its mean.
    "logit_normal" is the standard logit-normal, median 0.5 at shift 1; diffusers' scripts bake
    shift 3 in (median 0.75). Name the shift."""
    strata = torch.randperm(count, generator=generator).double()
    quantile = (strata + torch.rand(count, generator=generator, dtype=torch.float64)) / count
    if distribution == "logit_normal":
        inside = quantile.clamp(1e-6, 1 - 1e-6)
        quantile = torch.sigmoid(torch.special.ndtri(inside))
    return shift_sigma(quantile, shift).float()


PATCH = 2  # the side in latents of what the transformer sees as one token


def divisor_up_to(wanted: int, tokens: int) -> int:
    """The largest number of equally long runs, at most `wanted`, that `tokens` can be divided
    into.
    """
    return max(count for count in range(1, min(wanted, tokens) + 1) if tokens % count == 0)


def patches(latents: Tensor) -> int:
    """How many tokens the transformer sees of latents [..., h, w]."""
    return latents.shape[-2] // PATCH * (latents.shape[-1] // PATCH)


def velocity_loss(transformer: Any, batch: Batch, dtype: torch.dtype) -> Tensor:
    """One loss per example, [B] fp32, or per region, [B, R]. The transformer runs in `dtype`;
    noising and squared error are fp32.

    Args:
        transformer: called like diffusers' `SD3Transformer2DModel`.
    """
    sigma = batch.sigma.view(-1, 1, 1, 1)
    noisy = (1 - sigma) * batch.latents + sigma * batch.noise
    prediction = transformer(
        hidden_states=noisy.to(dtype),
        timestep=1000 * batch.sigma,
        encoder_hidden_states=batch.prompt_embeds.to(dtype),
        pooled_projections=batch.pooled.to(dtype),
        return_dict=False,
    )[0]
    error = (prediction.float() - (batch.noise - batch.latents)).square()
    if batch.patch_groups == 1:
        return error.flatten(1).mean(1)
    # row by row, as the transformer's tokens are
    of_patches = F.avg_pool2d(error.mean(1, keepdim=True), PATCH).flatten(1)
    return of_patches.view(len(batch), batch.patch_groups, -1).mean(2)
