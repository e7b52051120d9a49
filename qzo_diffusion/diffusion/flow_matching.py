"""Examples of a denoiser, their noise levels, and their losses.

    loss = mean over channels and pixels of (prediction - target)²    one for each example

Noise and sigma are arguments. A step draws them once, so that all its probes see the same ones.
`diffusion.objectives` says how latents are noised and which target they have; a family calls its
denoiser.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from qzo_diffusion.diffusion.encoded_prompt import equally_long
from qzo_diffusion.diffusion.objectives import FLOW, Objective

SigmaDistribution = Literal["uniform", "logit_normal"]
Level = TypeVar("Level", float, Tensor)


@dataclass(frozen=True)
class Batch:
    """Everything that one evaluation of the loss needs.

    latents [B, C, h, w] fp32 (already shifted and scaled), noise of the same shape, sigma [B] fp32,
    prompt_embeds [B, T, D], pooled [B, P] (P is 0 where a family has none). patch_groups: of an
    example. Each is an equally long run of its patches and has its own loss. weight [B] or
    [B, 1, h, w] fp32: factors of the losses of examples, or of the squared errors in each place;
    None is one for each. objective: the model's own."""

    latents: Tensor
    noise: Tensor
    sigma: Tensor
    prompt_embeds: Tensor
    pooled: Tensor
    patch_groups: int = 1
    weight: Tensor | None = None
    objective: Objective = FLOW

    def __len__(self) -> int:
        return len(self.sigma)

    def part(self, examples: slice) -> "Batch":
        """Return some of the examples."""
        return self._with(tensor[examples] for tensor in self._tensors())

    def repeated(self, times: int) -> "Batch":
        """Return all examples `times` times: all of them, then all of them again."""
        return self._with(torch.cat([tensor] * times) for tensor in self._tensors())

    def to(self, device: torch.device) -> "Batch":
        return self._with(tensor.to(device) for tensor in self._tensors())

    def split(self, size: int) -> list["Batch"]:
        """Return micro-batches of at most `size` examples; their losses average to this batch's."""
        parts = [tensor.split(size) for tensor in self._tensors()]
        return [self._with(tensors) for tensors in zip(*parts, strict=True)]

    def _with(self, tensors: Iterable[Tensor]) -> "Batch":
        latents, noise, sigma, prompt_embeds, pooled, *weight = tensors
        return Batch(
            *(latents, noise, sigma, prompt_embeds, pooled),
            patch_groups=self.patch_groups,
            weight=weight[0] if weight else None,
            objective=self.objective,
        )

    def _tensors(self) -> tuple[Tensor, ...]:
        always = (self.latents, self.noise, self.sigma, self.prompt_embeds, self.pooled)
        return always if self.weight is None else (*always, self.weight)

    @property
    def noisy(self) -> Tensor:
        """The denoiser's input, [B, C, h, w] fp32."""
        return self.objective.noisy(self.latents, self.noise, self.sigma)

    @property
    def target(self) -> Tensor:
        """The number that the denoiser is to predict, [B, C, h, w] fp32."""
        return self.objective.target(self.latents, self.noise, self.sigma)

    def weighted(self, weight: float) -> "Batch":
        """Return the batch with this factor for all of its losses."""
        factor = torch.full_like(self.sigma, weight)
        if self.weight is not None:
            factor = _in_places(factor) * _in_places(self.weight)
        return replace(self, weight=factor)

    def towards(self, target: Tensor) -> "Batch":
        """Return the batch with the same noisy inputs and another target [B, C, h, w]."""
        latents, noise = self.objective.with_target(self.noisy, target, self.sigma)
        return replace(self, latents=latents, noise=noise)

    @staticmethod
    def joined(parts: Sequence["Batch"]) -> "Batch":
        """Return one batch of the examples of all parts, which have one shape."""
        if any(part.weight is not None and part.weight.ndim > 1 for part in parts):
            parts = [part._with_weight_of_places() for part in parts]
        embeds = equally_long([part.prompt_embeds for part in parts])
        parts = [replace(part, prompt_embeds=one) for part, one in zip(parts, embeds, strict=True)]
        tensors = zip(*(part._tensors() for part in parts), strict=True)
        return parts[0]._with(torch.cat(same) for same in tensors)

    def _with_weight_of_places(self) -> "Batch":
        weight = torch.ones_like(self.sigma) if self.weight is None else self.weight
        places = (len(self), 1, *self.latents.shape[-2:])
        return replace(self, weight=_in_places(weight).expand(places))


def _in_places(weight: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1]; factors of places stay as they are."""
    return weight.view(-1, 1, 1, 1) if weight.ndim == 1 else weight


def shift_sigma(sigma: Level, shift: float) -> Level:
    """Apply the time shift of rectified flow (arXiv 2403.03206, equation 23).

    `shift` > 1 moves levels towards pure noise; 1 is the identity.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def sample_sigmas(
    count: int,
    generator: torch.Generator,
    *,
    distribution: SigmaDistribution = "uniform",
    shift: float = 1.0,
    low: float = 0.0,
    high: float = 1.0,
) -> Tensor:
    """Draw noise levels [count], one from each of `count` equal slices of the distribution, in
    random order.

    Such stratified levels remove most of the variance of sigma from a batch's loss and leave its
    mean. "logit_normal" is the standard logit-normal, with median 0.5 at shift 1. Scripts of
    diffusers apply shift 3 (median 0.75), so name the shift when you compare.

    Args:
        low, high: levels outside are never drawn; those inside keep their odds to each other.
    """
    strata = torch.randperm(count, generator=generator).double()
    quantile = (strata + torch.rand(count, generator=generator, dtype=torch.float64)) / count
    first, last = (share_below(level, distribution, shift) for level in (low, high))
    quantile = first + (last - first) * quantile
    if distribution == "logit_normal":
        inside = quantile.clamp(1e-6, 1 - 1e-6)
        quantile = torch.sigmoid(torch.special.ndtri(inside))
    return shift_sigma(quantile, shift).clamp(low, high).float()


def share_below(level: float, distribution: SigmaDistribution, shift: float) -> float:
    """The share of the distribution's noise levels that are lower than `level`, in [0, 1]."""
    unshifted = level / (level + shift * (1 - level))
    if distribution == "uniform":
        return unshifted
    return float(torch.special.ndtr(torch.logit(torch.tensor(unshifted, dtype=torch.float64))))


PATCH = 2  # latents along a side of one token of a transformer


def divisor_up_to(wanted: int, tokens: int) -> int:
    """Return the largest divisor of `tokens` that is at most `wanted`."""
    return max(count for count in range(1, min(wanted, tokens) + 1) if tokens % count == 0)


def patches(latents: Tensor) -> int:
    """Return the number of tokens that a transformer makes of latents [..., h, w]."""
    return latents.shape[-2] // PATCH * (latents.shape[-1] // PATCH)


def denoising_loss(prediction: Tensor, batch: Batch) -> Tensor:
    """Compute the loss of each example, [B] fp32, or of each patch group, [B, R].

    Args:
        prediction: of the batch's denoiser at its noisy inputs, [B, C, h, w] fp32.
    """
    error = (prediction - batch.target).square()
    for weight in (batch.objective.weight(batch.sigma), batch.weight):
        if weight is not None:
            error = error * _in_places(weight)
    if batch.patch_groups == 1:
        return error.flatten(1).mean(1)
    # row by row, in the order of the denoiser's tokens
    of_patches = F.avg_pool2d(error.mean(1, keepdim=True), PATCH).flatten(1)
    return of_patches.view(len(batch), batch.patch_groups, -1).mean(2)
