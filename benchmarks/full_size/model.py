"""A model of a family in its real shapes, or with fewer layers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qzo_diffusion.diffusion.autoencoders import reduction
from qzo_diffusion.diffusion.families.family import Family, Published
from qzo_diffusion.diffusion.flow_matching import Batch
from qzo_diffusion.diffusion.original_layout import LAYERS

TEXT_TOKENS = 64  # of a prompt


@dataclass(frozen=True)
class Subject:
    """The shapes of a model.

    layers: the most of each list of blocks, also of a language model.
    """

    family: Family
    published: Published
    layers: int = 10**3

    @property
    def config(self) -> dict[str, Any]:
        """The config of the denoiser."""
        own = self.published.denoiser
        return {**own, **{key: min(own[key], self.layers) for key in LAYERS & own.keys()}}

    def empty(self) -> nn.Module:
        from qzo_diffusion.diffusion.transformer import empty_transformer

        return empty_transformer(self.config)

    def batch(self, side: int) -> Batch:
        """Return one random example of `side` pixels."""
        generator = torch.Generator().manual_seed(0)
        sizes = self.family.denoiser.shape(self.config)
        edge = side // reduction(self.published.vae)
        latents, noise = (
            torch.randn(1, sizes.channels, edge, edge, generator=generator) for _ in range(2)
        )
        embeds = torch.randn(1, TEXT_TOKENS, sizes.text_width, generator=generator)
        pooled = torch.randn(1, self.config.get("pooled_projection_dim", 0), generator=generator)
        return Batch(latents, noise, torch.full((1,), 0.5), embeds, pooled)


def load_model(
    family: Family, folder: Path, cache: Path | None, dtype: torch.dtype = torch.bfloat16
) -> nn.Module:
    """Load a denoiser into NF4 as a run does; its copy is kept in `cache`."""
    from qzo_diffusion.diffusion.transformer import empty_transformer, find_transformer
    from qzo_diffusion.quant.stream import Quantization
    from qzo_diffusion.runs.loading import Source, load_quantized

    found = find_transformer(folder / family.denoiser.part, family)
    source = Source(found.entries, lambda: empty_transformer(found.config))
    how = Quantization(skip=family.denoiser.skip)
    options = {
        "dtype": dtype,
        "device": torch.device("cpu"),
        "cache": cache,
        "smallest_cached": 0,
    }
    return load_quantized(source, how, **options)  # type: ignore[arg-type]


def import_everything(config: dict[str, Any]) -> None:
    """As a run does; an empty model of a config also makes diffusers import what it needs."""
    import bitsandbytes  # noqa: F401

    from qzo_diffusion.diffusion.transformer import empty_transformer

    empty_transformer(config)
