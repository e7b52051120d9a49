"""Read the shape of a pipeline from configs and headers, and check its parts against each other.

That takes no memory for weights, so a damaged or foreign part is refused before any work.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.diffusion import known_models, sd3, text_encoders, vae
from qzo_diffusion.diffusion.text_encoders import CLIP_G, CLIP_L, T5
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
    """A text encoder or the VAE: its config, and its tensors on disk."""

    config: Mapping[str, Any]
    entries: Mapping[str, Entry]

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())


@dataclass(frozen=True)
class PipelineShape:
    """The parts of a pipeline.

    encoders: by the name of the part; T5 may be absent. native_resolution: the side in pixels that
    the model was trained at.
    """

    transformer: TransformerFiles
    vae: Part
    encoders: Mapping[str, Part]
    native_resolution: int

    @property
    def largest_side(self) -> int | None:
        """The largest side in pixels that the transformer has positions for; None if not known."""
        config = self.transformer.config
        if not isinstance(most := config.get("pos_embed_max_size"), int):
            return None
        return most * int(config.get("patch_size", 2)) * vae.reduction(self.vae.config)


def read_shape(folder: Path, transformer: Path, with_t5: bool = True) -> PipelineShape:
    """Read the shape of a pipeline's folder and of a transformer that may lie elsewhere.

    `check_shape` checks more.

    Raises:
        ModelError: the config or header of a part is damaged.
    """
    found = find_transformer(transformer)
    config = vae.read_vae_config(folder / "vae" / "config.json")
    vae_part = Part(config, read_entries(folder / "vae"))
    encoders = {part: _encoder(folder, part) for part in _encoders(folder, with_t5)}
    # a single file lacks this setting, the folder has it
    return PipelineShape(found, vae_part, encoders, sd3.native_resolution(folder))


def check_shape(shape: PipelineShape, folder: Path) -> None:
    """Check that all parts are whole and fit together.

    Raises:
        ModelError: a part is incomplete, or belongs to another model than the others.
    """
    _check(empty_transformer(shape.transformer.config), shape.transformer.entries)
    _check(vae.empty_vae(shape.vae.config), shape.vae.entries)
    for name, part in shape.encoders.items():
        place = str(folder / name / "config.json")
        _check(text_encoders.empty_encoder(name, part.config, place), part.entries)
        text_encoders.load_tokenizer(folder, name)
    sd3.load_scheduler(folder)
    _check_widths(shape, folder)


def known_shape(name: str) -> PipelineShape | None:
    """Return the shape of a published model, whose weights need not be here; None for an unknown
    one.
    """
    config = known_models.TRANSFORMERS.get(name)
    if config is None:
        return None
    encoders = {
        part: Part(settings, _entries(text_encoders.empty_encoder(part, settings)))
        for part, settings in known_models.ENCODERS.items()
    }
    vae_part = Part(known_models.VAE, _entries(vae.empty_vae(known_models.VAE)))
    transformer = TransformerFiles(_entries(empty_transformer(config)), config)
    side = config["sample_size"] * vae.reduction(known_models.VAE)
    return PipelineShape(transformer, vae_part, encoders, side)


def _encoders(folder: Path, with_t5: bool) -> list[str]:
    t5 = with_t5 and text_encoders.has_part(folder, T5)
    return [CLIP_L, CLIP_G, *([T5] if t5 else [])]


def _encoder(folder: Path, part: str) -> Part:
    entries = read_entries(folder / part)
    return Part(read_config(folder / part / "config.json", len(entries)), entries)


def _check(model: nn.Module, entries: Mapping[str, Entry]) -> None:
    check_fits(model, named_as_in(model, entries))


def _check_widths(shape: PipelineShape, folder: Path) -> None:
    """Check that each part takes the width that another part gives.

    Raises:
        ModelError: two widths differ.
    """
    transformer, parts = shape.transformer.config, shape.encoders
    pooled = [parts[part].config.get("projection_dim", 512) for part in (CLIP_L, CLIP_G)]
    pairs = [
        ("latents", shape.vae.config["latent_channels"], transformer["in_channels"]),
        ("pooled prompts", sum(pooled), transformer["pooled_projection_dim"]),
    ]
    if T5 in parts:
        width = parts[T5].config.get("d_model", 512)
        pairs.append(("prompts", width, transformer["joint_attention_dim"]))
    for thing, given, wanted in pairs:
        if given != wanted:
            raise ModelError(
                f"{folder} gives {thing} of {given} numbers",
                f"{wanted}, which the transformer takes",
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
