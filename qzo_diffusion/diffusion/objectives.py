"""How a denoiser's inputs are noised, and which number it was trained to predict.

A family reads its objective from the model's own configs; it is never guessed. Noise and levels are
arguments. A step draws them once, so that all its probes see the same ones.

An example's noise level sigma lies in [0, 1], where 1 is pure noise.
"""

import inspect
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from qzo_diffusion.core.errors import ConfigError, ModelError

TIMES = 1000  # of the schedulers at noise level 1


class Objective(Protocol):
    """Noising and target. Tensors are [B, C, h, w] fp32, `sigma` is [B] fp32."""

    def noisy(self, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """Return the denoiser's input."""
        ...

    def target(self, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """Return the number that the denoiser is to predict."""
        ...

    def with_target(self, noisy: Tensor, target: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return the latents and the noise that have this noisy input and this target."""
        ...

    def time(self, sigma: Tensor) -> Tensor:
        """Return the noise levels as the scheduler counts them, [B]."""
        ...

    def weight(self, sigma: Tensor) -> Tensor | None:
        """Return the factors [B] of the squared errors; None is one for each."""
        ...


@dataclass(frozen=True)
class Flow:
    """Rectified flow with plain velocity regression (arXiv 2209.03003, 2403.03206).

    noisy  = (1 - sigma) · latents + sigma · noise
    target = noise - latents
    """

    def noisy(self, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        sigma = sigma.view(-1, 1, 1, 1)
        return (1 - sigma) * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        return noise - latents

    def with_target(self, noisy: Tensor, target: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        sigma = sigma.view(-1, 1, 1, 1)
        return noisy - sigma * target, noisy + (1 - sigma) * target

    def time(self, sigma: Tensor) -> Tensor:
        return TIMES * sigma

    def weight(self, sigma: Tensor) -> Tensor | None:
        return None


FLOW = Flow()


@dataclass(frozen=True)
class Ddpm:
    """Denoising diffusion (arXiv 2006.11239), which predicts the noise or `v` (arXiv 2202.00512).

        noisy  = a · latents + b · noise        a = √ᾱ, b = √(1 - ᾱ), of the step ⌊T · sigma⌋ of T
        target = noise, or a · noise - b · latents

    products: ᾱ of each step [T], fp64. min_snr: squared errors are weighted so that none of the
    latents' own counts more than this (arXiv 2303.09556); None weights nothing.
    """

    products: Tensor
    predicts_v: bool
    min_snr: float | None = None

    def time(self, sigma: Tensor) -> Tensor:
        """Return the steps of noise levels, [B] integers."""
        count = len(self.products)
        return (sigma.double() * count).floor().long().clamp(0, count - 1)

    def noisy(self, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        of_latents, of_noise = self._parts(sigma)
        return of_latents * latents + of_noise * noise

    def target(self, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        if not self.predicts_v:
            return noise
        of_latents, of_noise = self._parts(sigma)
        return of_latents * noise - of_noise * latents

    def with_target(self, noisy: Tensor, target: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        of_latents, of_noise = self._parts(sigma)
        if self.predicts_v:
            return of_latents * noisy - of_noise * target, of_noise * noisy + of_latents * target
        return (noisy - of_noise * target) / of_latents, target

    def weight(self, sigma: Tensor) -> Tensor | None:
        if self.min_snr is None:
            return None
        product = self._products(sigma)
        snr = product / (1 - product)
        whole = snr + 1 if self.predicts_v else snr
        return (snr.clamp(max=self.min_snr) / whole).float()

    def _products(self, sigma: Tensor) -> Tensor:
        return self.products.to(sigma.device)[self.time(sigma)]

    def _parts(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return a and b, [B, 1, 1, 1] in the dtype of sigma."""
        product = self._products(sigma).view(-1, 1, 1, 1)
        return product.sqrt().to(sigma.dtype), (1 - product).sqrt().to(sigma.dtype)


def ddpm_of(scheduler: Any) -> Ddpm:
    """Return the objective that a scheduler's config states, whatever its class.

    Raises:
        ModelError: the config states a prediction that is not known.
    """
    from diffusers import DDPMScheduler

    config = dict(scheduler.config)
    kind = config.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction"):
        raise ModelError(
            f"a scheduler with prediction_type = {kind!r}",
            "epsilon or v_prediction",
            "put the scheduler/ of the model there",
        )
    names = inspect.signature(DDPMScheduler.__init__).parameters
    schedule = DDPMScheduler.from_config({key: config[key] for key in names if key in config})
    return Ddpm(schedule.alphas_cumprod.double(), kind == "v_prediction")


def with_min_snr(objective: Objective, limit: float | None) -> Objective:
    """Return the objective with weights of min-SNR; None changes nothing.

    Raises:
        ConfigError: it has no such weights.
    """
    if limit is None:
        return objective
    if not isinstance(objective, Ddpm):
        raise ConfigError(
            f"sigma.min_snr={limit:g} with a model of rectified flow",
            "a model that predicts noise or v",
            "leave sigma.min_snr out",
        )
    return replace(objective, min_snr=limit)
