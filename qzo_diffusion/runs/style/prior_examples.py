"""Examples of the prior, whose target is the number that the base predicts."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from qzo_diffusion.config.style import Config
from qzo_diffusion.core.noise import derive_key, torch_generator
from qzo_diffusion.diffusion.flow_matching import Batch
from qzo_diffusion.diffusion.sample import Sample
from qzo_diffusion.runs.style.examples import Texts, make_batch, training_levels
from qzo_diffusion.train.batch_plan import BatchPlan


class PriorExamples:
    """The prior's examples of any step, drawn from (seed, step) alone, apart from the style's.

    Args:
        latents: [C, h, w] on the CPU, by the samples' ids.
        base: the base's prediction [B, C, h, w] at a batch's noisy inputs. It is called outside of
            any probe, where the live scales are those that the run began with.
    """

    def __init__(
        self,
        config: Config,
        samples: Sequence[Sample],
        latents: Mapping[str, Tensor],
        encoded: Texts,
        base: Callable[[Batch], Tensor],
    ) -> None:
        self._config, self._samples, self._latents = config, samples, latents
        self._encoded, self._base = encoded, base
        self._plan = BatchPlan(
            [(at, latents[sample.id].shape) for at, sample in enumerate(samples)],
            batch_size=len(self),
            seed=derive_key(config.train.seed, "prior", bits=64),
        )

    def __len__(self) -> int:
        """Number of examples in each step."""
        return self._config.prior_examples

    def of_step(self, step: int) -> Batch:
        """Return the weighted examples of a step on the CPU, their pictures still the target."""
        chosen = [self._samples[index] for index in self._plan.batch(step)]
        generator = torch_generator(self._config.train.seed, step, "prior")
        latents = torch.stack([self._latents[sample.id] for sample in chosen])
        noise = torch.randn(latents.shape, generator=generator)
        sigma = training_levels(self._config, len(chosen), generator)
        captions = [sample.caption for sample in chosen]
        batch = make_batch(self._encoded, captions, latents, noise, sigma)
        return batch.weighted(self._config.prior.weight)

    @torch.no_grad()
    def towards_base(self, batch: Batch) -> Batch:
        """Return the same noisy inputs with the base's predictions as target."""
        parts = batch.split(self._config.train.micro_batch_size or len(batch))
        return Batch.joined([part.towards(self._base(part)) for part in parts])
