"""Find the weights of a denoiser, read its config, and build the empty model for them."""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.diffusion import empty
from qzo_diffusion.diffusion.families import registry
from qzo_diffusion.diffusion.families.family import Family
from qzo_diffusion.diffusion.pointwise import as_linear, replace_convolutions_
from qzo_diffusion.quant import describe, sdnq
from qzo_diffusion.quant.config_file import read_config
from qzo_diffusion.quant.entries import Entry
from qzo_diffusion.quant.gguf_entries import read_gguf_entries
from qzo_diffusion.quant.gguf_header import is_gguf
from qzo_diffusion.quant.weights import read_entries

# names of layers that diffusers gives to denoisers of known families
OF_DIFFUSERS = (
    r"\.attn\.add_q_proj\.|^single_transformer_blocks\.|^down_blocks\.\d+\.resnets\."
    r"|^all_x_embedder\."
)
# `quant_method` of layouts that diffusers knows and nothing here reads
NOT_READ = {"nunchaku_lite", "quanto", "torchao", "auto-round"}
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


def find_transformer(place: Path, family: Family | None = None) -> TransformerFiles:
    """Find a denoiser in a diffusers folder (`config.json` and safetensors, 4-bit or not), or in a
    single file in the original layout, safetensors or GGUF.

    Args:
        family: that it must be of; None finds it.

    Raises:
        ModelError: something is missing or damaged, or it is another kind of file.
    """
    entries = gguf_transformer(place) if is_gguf(place) else read_entries(place)
    own = registry.of_names(entries)
    file = (place if place.is_dir() else place.parent) / "config.json"
    layout = own.denoiser.layout if own is not None else None
    if own is not None and layout and not (file.is_file() and layout.are_of_diffusers(entries)):
        config = layout.config_of(entries)
        _check_family(own, family, str(place))
        return TransformerFiles(as_linear(layout.to_diffusers(entries, config)), config)
    if not file.is_file():
        raise _without_config(place, entries)
    config = _completed(read_config(file, len(entries)), file, family)
    settings = config.get("quantization_config")
    if isinstance(settings, dict) and settings.get("quant_method") == sdnq.METHOD:
        entries = sdnq.marked(entries, settings)
    return TransformerFiles(as_linear(entries), config)


def gguf_transformer(file: Path) -> dict[str, Entry]:
    """Return the tensors of a GGUF file, by its own names.

    Raises:
        ModelError: it is damaged, or a language model.
    """
    entries, header = read_gguf_entries(file)
    architecture = str(header.values.get("general.architecture", ""))
    own = registry.of_names(entries)
    if own is None and any(re.match(LLAMA, one) for one in entries):
        raise ModelError(
            f"{file}, a GGUF file of a language model ({architecture or 'unnamed'})",
            f"a GGUF file of a family of pictures, {registry.known()}",
            "give it to `qzo-diffuse llm --model`",
        )
    layout = own.denoiser.layout if own is not None else None
    return entries if layout is None else layout.whole_shapes(entries)


def _check_family(own: Family, wanted: Family | None, place: str) -> None:
    if wanted is not None and own is not wanted:
        raise ModelError(
            f"{place} of a denoiser of {own.title}",
            f"one of {wanted.title}, as the other parts of the model",
            "give a denoiser and a pipeline of one family",
        )


def _check_readable(config: Mapping[str, Any], file: Path) -> None:
    """Refuse by its name what another program quantized in a layout that is not read."""
    found = config.get("quantization_config")
    method = str(found.get("quant_method")) if isinstance(found, dict) else None
    if method in NOT_READ:
        raise ModelError(
            f"{file} of a denoiser that {method} quantized",
            "one in bf16 or fp16, in bitsandbytes' 4 bits, in fp8 with scales, or a GGUF file",
            "give the same model in one of these",
        )


def _without_config(place: Path, entries: Mapping[str, Entry]) -> ModelError:
    ours = any(re.search(OF_DIFFUSERS, name) for name in entries)
    kind = describe.WITHOUT_CONFIG if ours else describe.described_tensors(entries)
    if kind is None:
        return ModelError(
            f"{place} without config.json",
            "a folder of diffusers, or one file as its authors publish it",
            describe.KNOWN_FILE,
        )
    return ModelError(f"{place} is {kind.name}", registry.known(), kind.remedy)


def _completed(config: dict[str, Any], file: Path, family: Family | None) -> dict[str, Any]:
    """Fill in diffusers' own value for each setting that the file leaves out."""
    import diffusers

    own = registry.family_of(config)
    if own is None:
        kind = str(config["_class_name"])
        raise ModelError(
            f"{file} of a transformer of {describe.family_of_class(kind)} ({kind})",
            registry.known(),
            describe.KNOWN_FILE,
        )
    _check_family(own, family, str(file))
    _check_readable(config, file)
    model = getattr(diffusers, own.denoiser.class_name)
    parameters = inspect.signature(model.__init__).parameters.values()
    defaults = {one.name: one.default for one in parameters if one.default is not one.empty}
    return {"_class_name": own.denoiser.class_name} | defaults | config


def empty_transformer(config: Mapping[str, Any]) -> nn.Module:
    """Build the model with all tensors of its files on the meta device: it takes no memory.

    Raises:
        ModelError: diffusers refuses the config.
    """
    import diffusers

    family = registry.family_of(config) or registry.DEFAULT
    model = empty.from_config(
        getattr(diffusers, family.denoiser.class_name),
        config,
        "transformer",
        f"a model of {family.title}",
        "download it again",
    )
    replace_convolutions_(model)
    family.denoiser.fill(model)
    return model
