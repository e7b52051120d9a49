"""Export a run as a GGUF file for `qzo-diffuse export --format gguf`: its own file with other
factors, or a new one in another type.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from tqdm import tqdm

from qzo_diffusion.config.style import Config
from qzo_diffusion.core.errors import ConfigError
from qzo_diffusion.diffusion.gguf_rules import SD3 as RULES
from qzo_diffusion.diffusion.original_layout import PREFIX, to_original
from qzo_diffusion.diffusion.transformer import find_transformer
from qzo_diffusion.quant.gguf import GgufLinear, to_nearest
from qzo_diffusion.quant.gguf_entries import blocks_of
from qzo_diffusion.quant.gguf_make import Target, Type, write_quantized
from qzo_diffusion.quant.gguf_write import dithered, write_tuned
from qzo_diffusion.quant.load import handles_of
from qzo_diffusion.quant.stored import pending_dequantized
from qzo_diffusion.runs.publish import published_model
from qzo_diffusion.runs.style import pipeline

FORMAT: Literal["gguf"] = "gguf"


@dataclass(frozen=True)
class GgufOptions:
    """dither: keep the mean gain of each row. quantize_to: type of a new file, for a run on a base
    that is none in GGUF.
    """

    dither: bool = False
    quantize_to: Type | None = None

    @property
    def given(self) -> bool:
        return self.dither or self.quantize_to is not None


DEFAULT = GgufOptions()


def check_options(kind: str, options: GgufOptions) -> None:
    """Raises ConfigError for options of another format, or that exclude each other."""
    if kind != FORMAT and options.given:
        raise ConfigError(
            f"--dither or --quantize-to with --format {kind}",
            "--format gguf",
            "leave them out, or export as gguf",
        )
    if options.dither and options.quantize_to:
        raise ConfigError(
            "--dither with --quantize-to", "one of them", "leave --dither out; codes are new, too"
        )


def check_base(kind: str, options: GgufOptions, config: Config, folder: Path) -> None:
    """Raises ConfigError where the run's base does not allow the format."""
    in_blocks = bool(_blocks(config, folder))
    if in_blocks and kind in ("nf4", "native"):
        raise ConfigError(
            f"--format {kind} for a run on a GGUF file",
            "gguf, the file's own format; or bf16, delta, journal",
            "use --format gguf",
        )
    if kind != FORMAT:
        return
    if in_blocks and options.quantize_to:
        raise ConfigError(
            f"--quantize-to {options.quantize_to} for a run on a GGUF file",
            "the file's own types, since another one would round the weights twice",
            "leave --quantize-to out",
        )
    if not in_blocks and not options.quantize_to:
        raise ConfigError(
            "--format gguf for a run whose base is not in the blocks of a GGUF file",
            "a type to quantize the tuned weights to",
            "add --quantize-to Q8_0 or Q4_0; or train with --transformer FILE.gguf",
        )


def size_of(config: Config, folder: Path) -> int:
    """Return the bytes that an export takes at the most: a new file is smaller than 8.5 bits a
    weight, and its base has 4.5 at the least.
    """
    found = find_transformer(pipeline.transformer_place(config, folder))
    return found.nbytes * (1 if blocks_of(found.entries) else 2)


def stem_of(config: Config, folder: Path) -> str:
    """Return how the file's name begins: as the base's file, or as the base model."""
    place = pipeline.transformer_place(config, folder)
    return place.stem if place.is_file() else published_model(config.model).rpartition("/")[2]


def quantization_in_words(config: Config, folder: Path) -> str:
    """Return the type of the run's base, for a card."""
    blocks = _blocks(config, folder)
    if not blocks:
        return f"{config.quant.type}, blocks of {config.quant.blocksize}"
    return "GGUF: " + ", ".join(f"{kind} ({count} tensors)" for kind, count in blocks.items())


def _blocks(config: Config, folder: Path) -> Mapping[str, int]:
    return blocks_of(find_transformer(pipeline.transformer_place(config, folder)).entries)


def write(
    folder: Path, stem: str, place: Path, transformer: nn.Module, options: GgufOptions
) -> dict[str, Any]:
    """Write the file of a transformer with tuned scales, which is read from `place`, into `folder`.

    Args:
        stem: how the file's name begins.

    Returns figures: of a tuned file how much of the change it keeps, of a new one how far its
    weights are from the tuned ones.

    Raises:
        ModelError: a scale beyond the range of fp16, or a type that can't be made.
        OutputError: the file reads back different.
    """
    found = find_transformer(place)
    if options.quantize_to is not None:
        tensors = to_original(pending_dequantized(transformer, torch.float32), found.config)
        bare = {name.removeprefix(PREFIX): one for name, one in tensors.items()}
        file = folder / f"{stem}-tuned-{options.quantize_to}.gguf"
        target = Target(file, options.quantize_to, RULES.architecture, RULES.kept)
        with _bar(sum(one.nbytes for one in bare.values())) as bar:
            return {"weight_error": write_quantized(target, bare, bar.update)}
    layers = {}
    for handle in handles_of(transformer):
        module: Any = handle.module
        if isinstance(module, GgufLinear):
            entry = found.entries[f"{handle.name}.weight"]
            layers[handle.name] = entry, module, module.scales
    rounding = dithered if options.dither else to_nearest
    with _bar(sum(entry.nbytes for entry, _, _ in layers.values())) as bar:
        kept = write_tuned(place, folder / f"{stem}-tuned.gguf", layers, rounding, bar.update)
    return kept.facts() | {"rounding": "dithered" if options.dither else "nearest"}


def in_words(facts: Mapping[str, Any]) -> str:
    """Say on the card what the file keeps of the run."""
    if "weight_error" in facts:
        return (
            f"The weights of this file differ from the tuned ones by {facts['weight_error']:.2%} "
            "(root of mean squares): it was quantized again."
        )
    if facts["change_kept"] is None:
        return "The run changed nothing."
    return (
        f"Factors were rounded to 16 bits ({facts['rounding']}). The file keeps "
        f"{facts['change_kept']:.1%} of the run's change of single blocks, and "
        f"{facts['row_change_kept']:.1%} of that of whole rows."
    )


def _bar(size: int) -> Any:
    return tqdm(total=size, desc="write GGUF", unit="B", unit_scale=True, leave=False)
