"""The batch of any step of a run on rewards, drawn from (seed, step) alone: prompts and noise;
behind them the examples of the prior.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qzo_diffusion.config.style import Config
from qzo_diffusion.core.noise import torch_generator
from qzo_diffusion.core.probing import StepBatch
from qzo_diffusion.diffusion.encoded_prompt import EncodedPrompt
from qzo_diffusion.diffusion.flow_matching import Batch
from qzo_diffusion.diffusion.prompts import Prompt
from qzo_diffusion.rewards.pictures import PictureBatch
from qzo_diffusion.runs import build
from qzo_diffusion.runs.style.batches import parts_within
from qzo_diffusion.runs.style.prior_examples import PriorExamples
from qzo_diffusion.train.batch_plan import BatchPlan
from qzo_diffusion.train.distributed import Ranks


class RewardBatches:
    """Choose the prompts of a step and draw the noise of their pictures.

    Args:
        encoded: all prompts, and all negative prompts.
        shape: of the latents of one picture, (C, h, w).
    """

    def __init__(
        self,
        config: Config,
        prompts: Sequence[Prompt],
        encoded: Mapping[str, EncodedPrompt],
        shape: tuple[int, int, int],
        device: torch.device,
        ranks: Ranks,
        prior: PriorExamples | None = None,
    ) -> None:
        build.check_share(config.examples, ranks.world)
        build.check_scalars(config, config.examples)
        self._config, self._prompts, self._encoded, self._shape = config, prompts, encoded, shape
        self._device, self._ranks, self._prior = device, ranks, prior
        self._plan = BatchPlan(
            [(at, None) for at in range(len(prompts))],
            batch_size=config.data.batch_size,
            seed=config.train.seed,
            repeats=config.data.repeats,
        )

    def __call__(self, step: int) -> StepBatch[PictureBatch | Batch]:
        pictures = self._pictures(step)
        parts: list[Any] = [pictures] + ([self._prior.of_step(step)] if self._prior else [])
        whole = sum(map(len, parts))
        share = self._ranks.share(whole)
        mine = [part.to(self._device) for part in parts_within(parts, share)]
        if self._prior is not None and isinstance(mine[-1], Batch):
            mine[-1] = self._prior.towards_base(mine[-1])
        return StepBatch(
            [
                micro_batch
                for part in mine
                for micro_batch in part.split(build.micro_batch_size(self._config, len(part)))
            ],
            first_example=share.start,
            examples=whole,
            leading=len(pictures),
        )

    def _pictures(self, step: int) -> PictureBatch:
        chosen = [self._prompts[index] for index in self._plan.batch(step)]
        generator = torch_generator(self._config.train.seed, step, "reward")
        return picture_batch(
            self._config,
            chosen,
            self._encoded,
            torch.randn((len(chosen), *self._shape), generator=generator),
        )


def picture_batch(
    config: Config,
    prompts: Sequence[Prompt],
    encoded: Mapping[str, EncodedPrompt],
    noise: torch.Tensor,
) -> PictureBatch:
    """Return the batch of these prompts; a line without a negative prompt has the run's."""
    usual = config.sample.negative_prompt
    negatives = [usual if one.negative is None else one.negative for one in prompts]
    return PictureBatch.of(
        noise,
        [one.text for one in prompts],
        [encoded[one.text] for one in prompts],
        [encoded[text] for text in negatives],
    )
