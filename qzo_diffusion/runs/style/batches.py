"""Turn a style folder into batches. Text encoders and the VAE's encoder are needed only here."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from qzo_diffusion.config.style import Config
from qzo_diffusion.core.noise import derive_key, torch_generator
from qzo_diffusion.core.probing import StepBatch
from qzo_diffusion.diffusion import sd3
from qzo_diffusion.diffusion.flow_matching import Batch, divisor_up_to, patches, sample_sigmas
from qzo_diffusion.diffusion.latents import LatentSet, encode_samples
from qzo_diffusion.diffusion.prompts import Prompts
from qzo_diffusion.diffusion.sample import Sample
from qzo_diffusion.diffusion.sd3 import EncodedPrompt, stack_prompts
from qzo_diffusion.diffusion.style_folder import StyleFolder
from qzo_diffusion.diffusion.vae import drop_encoder_, image_encoder
from qzo_diffusion.runs import build
from qzo_diffusion.runs.style import pipeline
from qzo_diffusion.train.batch_plan import BatchPlan
from qzo_diffusion.train.distributed import Ranks

# each held-out image has noise of its own at each level
VALIDATION_SIGMAS = (0.125, 0.375, 0.625, 0.875)


@dataclass(frozen=True)
class Encoded:
    """The encoded style folder on the CPU, and the VAE without its encoder."""

    prompts: dict[str, EncodedPrompt]
    latents: LatentSet
    vae: Any


def encode(
    config: Config,
    folder: Path,
    style: StyleFolder,
    prompts: Prompts,
    device: torch.device,
    dtype: torch.dtype,
) -> Encoded:
    """Encode captions, sample prompts, the empty and the negative prompt, then the images.

    Each encoder is freed before the next is loaded.
    """
    cache = pipeline.tensor_cache(config)
    texts = (
        [sample.caption for sample in style.samples]
        + prompts.texts
        + prompts.negatives
        + ["", config.sample.negative_prompt]
    )
    unique = list(dict.fromkeys(texts))
    encoded = pipeline.prompt_encoder(config, folder, device, dtype).encode(unique)

    vae = pipeline.load_vae(config, folder, device)
    identity = sd3.fingerprint_of_files(folder, ("vae",)) + pipeline.tiles(config, style.samples)
    count = len(style.samples) * (2 if config.data.flip else 1)
    with tqdm(total=count, desc="encode images", leave=False) as bar:

        def show(done: int, _total: int) -> None:
            bar.update(done - bar.n)

        latents = encode_samples(
            style.samples,
            image_encoder(vae),
            cache=cache,
            encoder_id=identity,
            dtype="float32",
            flip=config.data.flip,
            progress=show,
        )
    drop_encoder_(vae)
    return Encoded(encoded, latents, vae)


class TrainingBatches:
    """The batch of any step, drawn from (seed, step) alone: images, flips, caption dropout, noise
    and noise levels.
    """

    def __init__(
        self,
        config: Config,
        samples: Sequence[Sample],
        encoded: Encoded,
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        build.check_share(config.data.batch_size, ranks.world)
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
            self._regions(encoded.latents.latents(sample.id, False)) for sample in one_of_each_size
        ]
        build.check_scalars(config, config.data.batch_size, max(patch_groups))

    def __call__(self, step: int) -> StepBatch[Batch]:
        data = self._config.data
        chosen = [self._samples[index] for index in self._plan.batch(step)]
        generator = torch_generator(self._config.train.seed, step, "data")
        chances = torch.rand(2, len(chosen), generator=generator)
        flipped = [data.flip and float(chance) < 0.5 for chance in chances[0]]
        captions = [
            "" if float(chance) < data.caption_dropout else sample.caption
            for chance, sample in zip(chances[1], chosen, strict=True)
        ]
        latents = torch.stack(
            [self._encoded.latents.latents(s.id, f) for s, f in zip(chosen, flipped, strict=True)]
        )
        noise = torch.randn(latents.shape, generator=generator)
        levels = self._config.sigma
        sigma = sample_sigmas(
            len(chosen),
            generator,
            distribution=levels.distribution,
            shift=levels.shift,
            low=levels.min,
            high=levels.max,
        )
        share, patch_groups = self._ranks.share(len(chosen)), self._regions(latents)
        whole = make_batch(
            self._encoded.prompts,
            captions,
            latents,
            noise,
            sigma,
            torch.device("cpu"),
            patch_groups,
        )
        mine = whole.part(share).to(self._device)
        return StepBatch(
            mine.split(build.micro_batch_size(self._config, len(mine))),
            float(sigma.mean()),
            first_example=share.start,
            examples=len(chosen),
            patch_groups=patch_groups,
        )

    def _regions(self, latents: Tensor) -> int:
        return divisor_up_to(self._config.qzo.regions, patches(latents))


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
            batches.append(make_batch(encoded.prompts, captions, latents, noises, sigmas, device))
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


def make_batch(
    prompts: dict[str, EncodedPrompt],
    captions: Sequence[str],
    latents: Tensor,
    noise: Tensor,
    sigma: Tensor,
    device: torch.device,
    patch_groups: int = 1,
) -> Batch:
    embeds, pooled = stack_prompts([prompts[caption] for caption in captions])
    return Batch(latents, noise, sigma, embeds, pooled, patch_groups).to(device)


def token_counts(
    style: StyleFolder, prompts: dict[str, EncodedPrompt]
) -> dict[str, tuple[int, bool]]:
    """Return sample id -> (tokens, truncated), for dataset.json."""
    return {s.id: (prompts[s.caption].tokens, prompts[s.caption].truncated) for s in style.samples}
