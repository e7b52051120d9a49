"""Turn a style folder into batches. Text encoders and the VAE's encoder are needed only here."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qzo_diffusion.config.style import Config
from qzo_diffusion.core.noise import derive_key, torch_generator
from qzo_diffusion.core.probing import StepBatch
from qzo_diffusion.diffusion.encoded_prompt import EncodedPrompt
from qzo_diffusion.diffusion.flow_matching import Batch, divisor_up_to, patches
from qzo_diffusion.diffusion.latents import LatentSet, encode_samples
from qzo_diffusion.diffusion.model_folder import fingerprint_of_files
from qzo_diffusion.diffusion.objectives import FLOW, Objective
from qzo_diffusion.diffusion.prompts import Prompts
from qzo_diffusion.diffusion.sample import Sample
from qzo_diffusion.diffusion.style_folder import StyleFolder
from qzo_diffusion.diffusion.vae import drop_encoder_, image_encoder
from qzo_diffusion.runs import build
from qzo_diffusion.runs.style import pipeline
from qzo_diffusion.runs.style.examples import CPU, make_batch, training_levels
from qzo_diffusion.runs.style.prior import PriorSource
from qzo_diffusion.runs.style.prior_examples import PriorExamples
from qzo_diffusion.system.progress import Progress
from qzo_diffusion.train.batch_plan import BatchPlan
from qzo_diffusion.train.distributed import Ranks

# each held-out image has noise of its own at each level
VALIDATION_SIGMAS = (0.125, 0.375, 0.625, 0.875)


@dataclass(frozen=True)
class Encoded:
    """The encoded style folder on the CPU, the VAE without its encoder, and the objective that the
    model was trained with. has_patches: whether layers have a loss of their own patch.
    """

    prompts: dict[str, EncodedPrompt]
    latents: LatentSet
    vae: Any
    objective: Objective = FLOW
    has_patches: bool = True


def encode(
    config: Config,
    folder: Path,
    style: StyleFolder,
    prompts: Prompts,
    device: torch.device,
    dtype: torch.dtype,
    prior: PriorSource | None = None,
) -> Encoded:
    """Encode captions, sample prompts, the empty and the negative prompt, then the images; the
    same of the prior.

    Each encoder is freed before the next is loaded.
    """
    texts = (
        [sample.caption for sample in style.samples]
        + prompts.texts
        + prompts.negatives
        + ["", config.sample.negative_prompt]
        + (prior.texts if prior else [])
    )
    unique = list(dict.fromkeys(texts))
    encoded = pipeline.prompt_encoder(config, folder, device, dtype).encode(unique)

    vae = pipeline.load_vae(config, folder, device)
    files = fingerprint_of_files(folder, ("vae",))
    latents = _latents(config, style.samples, vae, files, flip=config.data.flip)
    if prior:
        latents = latents.joined(_latents(config, prior.files, vae, files, flip=False))
    drop_encoder_(vae)
    objective = pipeline.objective_of(config, folder)
    has_patches = bool(pipeline.family_of(config, folder).denoiser.token_wise)
    return Encoded(encoded, latents, vae, objective, has_patches)


def _latents(
    config: Config, samples: Sequence[Sample], vae: Any, files: str, *, flip: bool
) -> LatentSet:
    """Return latents by sample id and mirroring; `files` identifies the VAE."""
    count = len(samples) * (2 if flip else 1)
    with Progress(total=count, desc="encode images", leave=False, disable=not count) as bar:

        def show(done: int, _total: int) -> None:
            bar.update(done - bar.n)

        return encode_samples(
            samples,
            image_encoder(vae),
            cache=pipeline.tensor_cache(config),
            encoder_id=files + pipeline.tiles(config, samples),
            dtype="float32",
            flip=flip,
            progress=show,
        )


class TrainingBatches:
    """The batch of any step, drawn from (seed, step) alone: images, flips, caption dropout, noise
    and noise levels; behind them the examples of the prior.
    """

    def __init__(
        self,
        config: Config,
        samples: Sequence[Sample],
        encoded: Encoded,
        device: torch.device,
        ranks: Ranks,
        prior: PriorExamples | None = None,
    ) -> None:
        self._prior = prior
        examples = config.data.batch_size + (len(prior) if prior else 0)
        build.check_share(examples, ranks.world)
        items = [(index, (sample.width, sample.height)) for index, sample in enumerate(samples)]
        seed = config.train.seed
        self._plan = BatchPlan(
            items, batch_size=config.data.batch_size, seed=seed, repeats=config.data.repeats
        )
        self._config, self._samples, self._encoded, self._device, self._ranks = (
            config,
            samples,
            encoded,
            device,
            ranks,
        )
        one_of_each_size = {(sample.width, sample.height): sample for sample in samples}.values()
        patch_groups = [
            self._patch_groups([encoded.latents.latents(sample.id, False)])
            for sample in one_of_each_size
        ]
        build.check_scalars(config, examples, max(patch_groups))

    def __call__(self, step: int) -> StepBatch[Batch]:
        style = self._of_style(step)
        sigma_mean = float(style.sigma.mean())
        if self._prior is None:
            return self._shared([style], sigma_mean)
        prior = self._prior.of_step(step)
        return self._shared([style.weighted(1.0), prior], sigma_mean)

    def _shared(self, parts: Sequence[Batch], sigma_mean: float) -> StepBatch[Batch]:
        """Return this rank's share of the examples of all parts, in micro-batches."""
        whole, patch_groups = (
            sum(map(len, parts)),
            self._patch_groups([part.latents for part in parts]),
        )
        share = self._ranks.share(whole)
        mine = [
            replace(part, patch_groups=patch_groups).to(self._device)
            for part in parts_within(parts, share)
        ]
        if self._prior is not None and share.stop > len(parts[0]):
            mine[-1] = self._prior.towards_base(mine[-1])
        return StepBatch(
            [
                micro_batch
                for batch in _joined_if_alike(mine)
                for micro_batch in batch.split(build.micro_batch_size(self._config, len(batch)))
            ],
            sigma_mean,
            first_example=share.start,
            examples=whole,
            patch_groups=patch_groups,
        )

    def _of_style(self, step: int) -> Batch:
        data = self._config.data
        chosen = [self._samples[index] for index in self._plan.batch(step)]
        generator = torch_generator(self._config.train.seed, step, "data")
        chances = torch.rand(2, len(chosen), generator=generator)
        flipped = [data.flip and float(chance) < 0.5 for chance in chances[0]]
        captions = [
            "" if float(chance) < data.caption_dropout else sample.caption
            for chance, sample in zip(chances[1], chosen, strict=True)
        ]
        keys = [(sample.id, flip) for sample, flip in zip(chosen, flipped, strict=True)]
        latents = torch.stack([self._encoded.latents.latents(*key) for key in keys])
        weight = self._encoded.latents.weights(keys)
        noise = torch.randn(latents.shape, generator=generator)
        sigma = training_levels(self._config, len(chosen), generator)
        return make_batch(self._encoded, captions, latents, noise, sigma, CPU, weight)

    def _patch_groups(self, latents: Sequence[Tensor]) -> int:
        """Return the number of patch groups of a step, which latents of any shape can have."""
        if not self._encoded.has_patches:
            return 1
        tokens = math.gcd(*map(patches, latents))
        return divisor_up_to(self._config.qzo.regions, tokens)


def parts_within(parts: Sequence[Any], share: slice) -> list[Any]:
    """Return the examples `share` of all parts, one part after the other; no part is empty."""
    found, start = [], 0
    for part in parts:
        own = slice(max(0, share.start - start), max(0, share.stop - start))
        start += len(part)
        if len(taken := part.part(own)):
            found.append(taken)
    return found


def _joined_if_alike(parts: Sequence[Batch]) -> list[Batch]:
    """Return one batch of all examples if they have one shape."""
    shapes = {part.latents.shape[1:] for part in parts}
    return [Batch.joined(parts)] if len(shapes) == 1 < len(parts) else list(parts)


def validation_batches(
    samples: Sequence[Sample], encoded: Encoded, device: torch.device, batch_size: int, seed: int
) -> list[Batch]:
    """Return the same images, noise and noise levels every time. They depend only on the run's
    seed.
    """

    def noise(sample: Sample, sigma: float) -> Tensor:
        generator = torch.Generator().manual_seed(
            derive_key(seed, "validation", sample.sha256, str(sigma), bits=64) >> 1
        )
        return torch.randn(encoded.latents.latents(sample.id, False).shape, generator=generator)

    batches = []
    for entries in _by_shape(samples):
        for start in range(0, len(entries), batch_size):
            part = entries[start : start + batch_size]
            latents = torch.stack([encoded.latents.latents(sample.id, False) for sample, _ in part])
            sigmas = torch.tensor([sigma for _, sigma in part])
            captions = [sample.caption for sample, _ in part]
            noises = torch.stack([noise(sample, sigma) for sample, sigma in part])
            weight = encoded.latents.weights([(sample.id, False) for sample, _ in part])
            batches.append(make_batch(encoded, captions, latents, noises, sigmas, device, weight))
    return batches


def validation_order(samples: Sequence[Sample]) -> list[str]:
    """Return the ids of the images behind the examples of `validation_batches`, in their order."""
    return [sample.id for entries in _by_shape(samples) for sample, _ in entries]


def _by_shape(samples: Sequence[Sample]) -> list[list[tuple[Sample, float]]]:
    """Return every held-out image at every noise level, grouped by size."""
    by_shape: dict[tuple[int, int], list[tuple[Sample, float]]] = {}
    for sample in samples:
        by_shape.setdefault((sample.width, sample.height), []).extend(
            (sample, sigma) for sigma in VALIDATION_SIGMAS
        )
    return list(by_shape.values())


def token_counts(
    style: StyleFolder, prompts: dict[str, EncodedPrompt]
) -> dict[str, tuple[int, bool]]:
    """Return sample id -> (tokens, truncated), for dataset.json."""
    return {s.id: (prompts[s.caption].tokens, prompts[s.caption].truncated) for s in style.samples}
