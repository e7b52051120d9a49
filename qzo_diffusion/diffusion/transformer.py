"""Find the weights of an SD3 transformer, read its config, and build the empty model for them."""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.diffusion import empty, original_layout
from qzo_diffusion.quant import describe
from qzo_diffusion.quant.config_file import read_config
from qzo_diffusion.quant.entries import Entry
from qzo_diffusion.quant.gguf_entries import read_gguf_entries
from qzo_diffusion.quant.gguf_header import is_gguf
from qzo_diffusion.quant.weights import read_entries

CLASS = "SD3Transformer2DModel"
LLAMA = r"blk\.\d+\.|token_embd\."  # llama.cpp's names of layers


@dataclass(frozen=True)
class TransformerFiles:
    """Tensors by diffusers' names, in any layout on disk, and the transformer's config."""

    entries: Mapping[str, Entry]
    config: dict[str, Any]

    @property
    def files(self) -> list[Path]:
        return sorted({span.file for entry in self.entries.values() for span in entry.spans})

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())


def find_transformer(place: Path) -> TransformerFiles:
    """Find a transformer in a diffusers folder (`config.json` and safetensors, 4-bit or not), or in
    a single file in the original layout, safetensors or GGUF.

    Raises:
        ModelError: something is missing or damaged, or it is another kind of file.
    """
    entries = gguf_transformer(place) if is_gguf(place) else read_entries(place)
    if original_layout.is_original(entries):
        config = original_layout.config_of(entries)
        return TransformerFiles(original_layout.to_diffusers(entries, config), config)
    file = (place if place.is_dir() else place.parent) / "config.json"
    if not file.is_file():
        raise _without_config(place, entries)
    return TransformerFiles(entries, _completed(read_config(file, len(entries)), file))


def gguf_transformer(file: Path) -> dict[str, Entry]:
    """Return the tensors of a GGUF file, by its own names.

    Raises:
        ModelError: it is damaged, or a language model.
    """
    entries, header = read_gguf_entries(file)
    architecture = str(header.values.get("general.architecture", ""))
    if not original_layout.is_original(entries) and any(re.match(LLAMA, one) for one in entries):
        raise ModelError(
            f"{file}, a GGUF file of a language model ({architecture or 'unnamed'})",
            "a GGUF file of Stable Diffusion 3 or 3.5",
            "give it to `qzo-diffuse llm --model`",
        )
    return original_layout.whole_shapes(entries)


def _without_config(place: Path, entries: Mapping[str, Entry]) -> ModelError:
    ours = any(".attn.add_q_proj." in name for name in entries)
    kind = describe.WITHOUT_CONFIG if ours else describe.described_tensors(entries)
    if kind is None:
        return ModelError(
            f"{place} without config.json",
            "a folder of diffusers, or one file in the layout of Stability AI",
            describe.SD3_FILE,
        )
    return ModelError(f"{place} is {kind.name}", describe.SUPPORTED, kind.remedy)


def _completed(config: dict[str, Any], file: Path) -> dict[str, Any]:
    """Fill in diffusers' own value for each setting that the file leaves out."""
    from diffusers import SD3Transformer2DModel

    kind = config.get("_class_name", CLASS)
    if kind != CLASS:
        family = describe.family_of_class(str(kind))
        raise ModelError(
            f"{file} of a transformer of {family} ({kind})", describe.SUPPORTED, describe.SD3_FILE
        )
    parameters = inspect.signature(SD3Transformer2DModel.__init__).parameters.values()
    defaults = {one.name: one.default for one in parameters if one.default is not one.empty}
    return defaults | config


def empty_transformer(config: Mapping[str, Any]) -> nn.Module:
    """Build the model with all its tensors on the meta device: it takes no memory.

    Raises:
        ModelError: diffusers refuses the config.
    """
    from diffusers import SD3Transformer2DModel

    return empty.from_config(
        SD3Transformer2DModel,
        config,
        "transformer",
        "a Stable Diffusion 3 model",
        "download it again",
    )
