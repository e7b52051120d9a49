"""Read the shape of a pipeline from configs and headers, and check its parts against each other.

That takes no memory for weights, so a damaged or foreign part is refused before any work.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.diffusion import text_encoders, vae
from qzo_diffusion.diffusion.autoencoders import latent_channels, reduction
from qzo_diffusion.diffusion.families import registry
from qzo_diffusion.diffusion.families.family import Family
from qzo_diffusion.diffusion.model_folder import load_scheduler, native_resolution, read_index
from qzo_diffusion.diffusion.text_encoders import EncoderKind
from qzo_diffusion.diffusion.transformer import (
    TransformerFiles,
    empty_transformer,
    find_transformer,
)
from qzo_diffusion.quant.config_file import read_config
from qzo_diffusion.quant.entries import Entry, Span
from qzo_diffusion.quant.fits import check_fits, named_as_in, slots_of
from qzo_diffusion.quant.weights import read_entries

NOT_HERE = Path("not here")
STORED = torch.bfloat16  # the dtype of published weights; float16 takes as much


@dataclass(frozen=True)
class Part:
    """A text encoder or the VAE: its config, and its tensors on disk that are loaded."""

    config: Mapping[str, Any]
    entries: Mapping[str, Entry]

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())


@dataclass(frozen=True)
class PipelineShape:
    """The parts of a pipeline.

    encoders: by the name of the part; a large one may be absent. native_resolution: the side in
    pixels that the model was trained at. distilled: to few steps.
    """

    family: Family
    transformer: TransformerFiles
    vae: Part
    encoders: Mapping[str, Part]
    native_resolution: int
    distilled: bool = False

    @property
    def largest_side(self) -> int | None:
        """The largest side in pixels that the transformer has positions for; None if not known."""
        config = self.transformer.config
        if not isinstance(most := config.get("pos_embed_max_size"), int):
            return None
        return most * int(config.get("patch_size", 2)) * reduction(self.vae.config)


def read_shape(
    folder: Path, family: Family, transformer: Path, with_t5: bool = True
) -> PipelineShape:
    """Read the shape of a pipeline's folder and of a transformer that may lie elsewhere.

    `check_shape` checks more.

    Raises:
        ModelError: the config or header of a part is damaged.
    """
    found = find_transformer(transformer, family)
    config = vae.read_vae_config(folder / "vae" / "config.json", family)
    vae_part = Part(config, read_entries(folder / "vae"))
    parts = _encoders(folder, family, with_t5)
    encoders = {part: _encoder(folder, part, family.texts.classes[part]) for part in parts}
    # a single file lacks this setting, the folder has it
    side = native_resolution(folder, family)
    distilled = family.distilled(found.config, read_index(folder))
    return PipelineShape(family, found, vae_part, encoders, side, distilled)


def check_shape(shape: PipelineShape, folder: Path) -> None:
    """Check that all parts are whole and fit together.

    Raises:
        ModelError: a part is incomplete, or belongs to another model than the others.
    """
    _check(empty_transformer(shape.transformer.config), shape.transformer.entries)
    _check(vae.empty_vae(shape.vae.config), shape.vae.entries)
    for name, part in shape.encoders.items():
        place = str(folder / name / "config.json")
        kind = shape.family.texts.classes[name]
        _check(text_encoders.empty_encoder(kind, part.config, place), part.entries)
        text_encoders.load_tokenizer(folder, name)
    load_scheduler(folder, shape.family)
    _check_widths(shape, folder)


@functools.cache
def known_shape(name: str) -> PipelineShape | None:
    """Return the shape of a published model, whose weights need not be here; None for an unknown
    one.
    """
    found = registry.published(name)
    if found is None:
        return None
    family, model = found
    encoders = {
        part: Part(settings, _entries(text_encoders.empty_encoder(kind, settings)))
        for (part, settings), kind in zip(
            model.encoders.items(), family.texts.classes.values(), strict=True
        )
    }
    vae_part = Part(model.vae, _entries(vae.empty_vae(model.vae)))
    transformer = TransformerFiles(
        _entries(empty_transformer(model.denoiser)), dict(model.denoiser)
    )
    latent_side = model.denoiser.get("sample_size", family.denoiser.sample_size)
    side = latent_side * reduction(model.vae)
    distilled = family.distilled(model.denoiser, model.index)
    return PipelineShape(family, transformer, vae_part, encoders, side, distilled)


def _encoders(folder: Path, family: Family, with_t5: bool) -> list[str]:
    t5 = family.texts.large if family.texts.large_optional else None
    return [
        part
        for part in family.texts.classes
        if part != t5 or (with_t5 and text_encoders.has_part(folder, part))
    ]


def _encoder(folder: Path, part: str, kind: EncoderKind) -> Part:
    entries = text_encoders.read_encoder_entries(folder, part, kind)
    return Part(read_config(folder / part / "config.json", len(entries)), entries)


def _check(model: nn.Module, entries: Mapping[str, Entry]) -> None:
    check_fits(model, named_as_in(model, entries))


def _check_widths(shape: PipelineShape, folder: Path) -> None:
    """Check that each part takes the width that another part gives.

    Raises:
        ModelError: two widths differ.
    """
    denoiser = shape.transformer.config
    encoders = {name: part.config for name, part in shape.encoders.items()}
    channels = shape.family.denoiser.shape(denoiser).channels
    pairs = [
        ("latents", latent_channels(shape.vae.config), channels),
        *shape.family.texts.widths(denoiser, encoders),
    ]
    for thing, given, wanted in pairs:
        if given != wanted:
            raise ModelError(
                f"{folder} gives {thing} of {given} numbers",
                f"{wanted}, which the denoiser takes",
                "use the parts of one model",
            )


def _entries(model: nn.Module) -> dict[str, Entry]:
    """Return the tensors of a model as files hold them, with 16-bit weights."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    return {
        name: Entry(STORED, tuple(slot.shape), (Span(NOT_HERE, 0, slot.numel() * STORED.itemsize),))
        for name, slot in slots_of(model).items()
        if slot.is_meta and name not in tied
    }
