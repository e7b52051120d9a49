"""Export a run as a GGUF file for `qzo-diffuse export --format gguf`: its own file with other
factors, or a new one in another type.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from qzo_diffusion.config.style import Config
from qzo_diffusion.core.errors import ConfigError
from qzo_diffusion.diffusion.original_layout import PREFIX
from qzo_diffusion.diffusion.transformer import find_transformer
from qzo_diffusion.quant.gguf import GgufLinear, to_nearest
from qzo_diffusion.quant.gguf_entries import blocks_in_words
from qzo_diffusion.quant.gguf_make import Target, Type, write_quantized
from qzo_diffusion.quant.gguf_write import dithered, write_tuned
from qzo_diffusion.quant.load import handles_of
from qzo_diffusion.quant.stored import pending_dequantized
from qzo_diffusion.runs.publish import published_model
from qzo_diffusion.runs.style import pipeline
from qzo_diffusion.system.progress import Progress

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
    in_blocks = _blocks(config, folder)
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


def quantization_in_words(config: Config, folder: Path) -> str:
    """Return the type of the run's base, for a card."""
    blocks = _blocks(config, folder)
    if not blocks:
        return f"{config.quant.type}, blocks of {config.quant.blocksize}"
    return f"GGUF: {blocks}"


def _blocks(config: Config, folder: Path) -> str:
    return blocks_in_words(find_transformer(pipeline.transformer_place(config, folder)).entries)


@dataclass(frozen=True)
class Written:
    """The file of a run, which is written once.

    transformer: with the tuned scales. figures: of a tuned file how much of the change it keeps, of
    a new one how far its weights are from the tuned ones.
    """

    config: Config
    folder: Path
    transformer: nn.Module
    options: GgufOptions
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def place(self) -> Path:
        return pipeline.transformer_place(self.config, self.folder)

    def most_bytes(self) -> int:
        """Return the bytes of the file at the most: a new one has 8.5 bits a weight or less, and
        its base 4.5 or more.
        """
        return find_transformer(self.place).nbytes * (2 if self.options.quantize_to else 1)

    def into(self, folder: Path) -> str:
        """Write the file into `folder`; return what it keeps of the run, in words.

        Raises:
            ModelError: a scale or weight beyond the range of fp16.
            OutputError: the file reads back different.
        """
        if self.options.quantize_to is not None:
            return self._quantized(folder, self.options.quantize_to)
        return self._same(folder)

    def _same(self, folder: Path) -> str:
        entries, layers = find_transformer(self.place).entries, {}
        for handle in handles_of(self.transformer):
            module: Any = handle.module
            if isinstance(module, GgufLinear):
                layers[handle.name] = entries[f"{handle.name}.weight"], module, module.scales
        rounding = dithered if self.options.dither else to_nearest
        file = folder / f"{self.place.stem}-tuned.gguf"
        with _bar(sum(entry.nbytes for entry, _, _ in layers.values())) as bar:
            kept = write_tuned(self.place, file, layers, rounding, bar.update).facts()
        how = "dithered" if self.options.dither else "nearest"
        self.figures.update(kept | {"rounding": how})
        if kept["change_kept"] is None:
            return "The run changed nothing, and the file is that of its base."
        return (
            f"Factors were rounded to 16 bits ({how}). The file keeps {kept['change_kept']:.1%} of "
            f"the run's change of single blocks, and {kept['row_change_kept']:.1%} of that of rows."
        )

    def _quantized(self, folder: Path, kind: Type) -> str:
        family = pipeline.family_of(self.config, self.folder)
        layout = family.denoiser.layout
        if layout is None:
            raise ConfigError(
                f"--quantize-to {kind} for a model of {family.title}",
                "a family whose files have a layout of their own",
                "export it as bf16",
            )
        found = find_transformer(self.place).config
        tensors = layout.to_original(pending_dequantized(self.transformer, torch.float32), found)
        bare = {name.removeprefix(PREFIX): one for name, one in tensors.items()}
        name = published_model(self.config.model).rpartition("/")[2]
        stem = self.place.stem if self.place.is_file() else name
        file = folder / f"{stem}-tuned-{kind}.gguf"
        target = Target(file, kind, family.gguf[0], family.gguf_kept)
        with _bar(sum(one.nbytes for one in bare.values())) as bar:
            error = write_quantized(target, bare, bar.update)
        self.figures["weight_error"] = round(error, 6)
        return (
            f"The weights of this file differ from the tuned ones by {error:.2%} (root of mean "
            "squares), because they were quantized again."
        )


def _bar(size: int) -> Any:
    return Progress(total=size, desc="write GGUF", unit="B", unit_scale=True, leave=False)
