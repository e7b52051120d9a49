"""Where an SD3 transformer's weights are, what shape it has, and the empty model that they are read
into.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.diffusion import original_layout
from qzo_diffusion.quant.entries import Entry
from qzo_diffusion.quant.weights import read_entries


@dataclass(frozen=True)
class TransformerFiles:
    """Tensors by diffusers' names, wherever they lie, and the transformer's config."""

    entries: Mapping[str, Entry]
    config: dict[str, Any]

    @property
    def files(self) -> list[Path]:
        return sorted({span.file for entry in self.entries.values() for span in entry.spans})

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())


def find_transformer(place: Path) -> TransformerFiles:
    """A diffusers folder (`config.json` and safetensors, 4-bit or not), or a single file in the
    original layout.

    Raises:
        ModelError: something is missing or damaged.
    """
    entries = read_entries(place)
    if original_layout.is_original(entries):
        config = original_layout.config_of(entries)
        return TransformerFiles(original_layout.to_diffusers(entries, config), config)
    return TransformerFiles(
        entries, read_config((place if place.is_dir() else place.parent) / "config.json")
    )


def read_config(file: Path) -> dict[str, Any]:
    """Raises ModelError unless the file describes a model."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not a mapping")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ModelError(
            f"{file} can't be read: {reason}", "the config of a model", "download the model again"
        ) from None
    return config


def empty_transformer(config: Mapping[str, Any]) -> nn.Module:
    """The model with all its tensors on the meta device: no memory, whatever its size.

    Raises:
        ModelError: diffusers does not know such a config.
    """
    from diffusers import SD3Transformer2DModel

    settings = {name: value for name, value in config.items() if name != "quantization_config"}
    try:
        with torch.device("meta"):
            return SD3Transformer2DModel.from_config(settings).eval()
    except (TypeError, ValueError, KeyError) as error:
        raise ModelError(
            f"a transformer config that diffusers refuses: {error}",
            "a Stable Diffusion 3 model",
            "download it again",
        ) from None
