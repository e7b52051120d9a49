"""Draw the pictures of a run's prior, and make its examples."""

import torch
from torch import nn

from qzo_diffusion.config.style import Config
from qzo_diffusion.diffusion.families.family import Family
from qzo_diffusion.runs.style import pipeline
from qzo_diffusion.runs.style.batches import Encoded
from qzo_diffusion.runs.style.prior import (
    DrawnPrior,
    PriorSource,
    drawing_key,
    latents_of_files,
    seeded,
)
from qzo_diffusion.runs.style.prior_examples import PriorExamples
from qzo_diffusion.train.distributed import Ranks


def drawn_prior(
    config: Config,
    source: PriorSource | None,
    runtime: pipeline.Runtime,
    ranks: Ranks,
    transformer: nn.Module,
    base: tuple[str, str],
    encoded: Encoded,
) -> DrawnPrior | None:
    """Draw the prior's pictures, on the first rank before the others, which may find them in the
    cache.

    Args:
        base: fingerprints of the codes, and of the scales that the run begins with.
    """
    if source is None or source.prompts is None:
        return None
    if not ranks.first:
        ranks.wait()
    config = seeded(config)
    prompts, texts = source.prompts.prompts, encoded.prompts
    sampler = pipeline.sampler(config, runtime, transformer, encoded.vae, prompts, texts)
    key = drawing_key(config, source, runtime, base, texts)
    drawn = DrawnPrior(source, sampler, pipeline.tensor_cache(config), key)
    if ranks.first:
        ranks.wait()
    return drawn


def prior_examples(
    config: Config,
    source: PriorSource | None,
    family: Family,
    transformer: nn.Module,
    dtype: torch.dtype,
    encoded: Encoded,
    drawn: DrawnPrior | None,
) -> PriorExamples | None:
    """Return the examples of drawn pictures, or of those of a folder."""
    if source is None:
        return None
    latents = (
        latents_of_files(source.files, encoded.latents.by_key) if drawn is None else drawn.latents
    )
    return PriorExamples(
        config,
        source.samples,
        latents,
        encoded,
        lambda batch: family.denoiser.predict(transformer, batch, dtype),
    )
