"""Export a run's tuned model for `qzo-diffuse export` in a form that other programs load.

Everything is written into a temporary folder, read back and compared bit for bit. Only then it gets
its name, so a kill leaves no export. Tensors are computed and written one by one, so memory never
holds a second model."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qzo_diffusion import devices
from qzo_diffusion.config.files import load_config
from qzo_diffusion.config.style import Config
from qzo_diffusion.core.delta import shrunk
from qzo_diffusion.core.errors import ConfigError
from qzo_diffusion.core.merge import merge_changes_
from qzo_diffusion.diffusion.levels import in_comfyui
from qzo_diffusion.diffusion.model_card import DIFFUSERS, modelspec
from qzo_diffusion.diffusion.model_folder import load_scheduler, native_resolution
from qzo_diffusion.diffusion.pointwise import as_convolutions
from qzo_diffusion.diffusion.transformer import find_transformer
from qzo_diffusion.quant import sdnq
from qzo_diffusion.quant.bnb import quantization_config
from qzo_diffusion.quant.load import frozen_fingerprint, handles_of
from qzo_diffusion.quant.stored import pending_dequantized, pending_tensors
from qzo_diffusion.quant.weights import Pending, compare_tensors, write_tensors
from qzo_diffusion.runs import provenance
from qzo_diffusion.runs.locate import locate
from qzo_diffusion.runs.publish import (
    published,
    published_facts,
)
from qzo_diffusion.runs.style import export_gguf, pipeline
from qzo_diffusion.runs.style.export_gguf import DEFAULT, GgufOptions
from qzo_diffusion.runs.style.export_journal import export_journal
from qzo_diffusion.runs.style.export_lora import FILE as LORA_FILE
from qzo_diffusion.runs.style.export_lora import compared_inputs, in_words, lora
from qzo_diffusion.runs.style.export_use import (
    DIFFUSERS_FILE,
    ORIGINAL_FILE,
    Format,
    Layout,
)
from qzo_diffusion.runs.style.exported import Export, check_room
from qzo_diffusion.runs.style.memory import sizes
from qzo_diffusion.runs.tuned import load_tuned
from qzo_diffusion.system.console import report
from qzo_diffusion.system.files import (
    SCALES,
    check_new,
    write_folder,
)
from qzo_diffusion.system.progress import Progress

DEFAULT_RANK = 32


def run(
    run_folder: Path,
    kind: Format,
    output_dir: Path,
    layout: Layout = "diffusers",
    rank: int = DEFAULT_RANK,
    options: GgufOptions = DEFAULT,
) -> dict[str, Any]:
    """Write `output_dir`; return the figures for `--json`.

    `layout` is of bf16 alone, `rank` of lora alone, `options` of gguf alone.

    Raises:
        OutputError: `output_dir` exists, the disk has no room, or the export reads back different.
        ModelError, ConfigError, JournalError: the run and the format or the base don't fit
            together.
    """
    check_new(output_dir)
    export_gguf.check_options(kind, options)
    config: Config = load_config(locate(run_folder).need("style").settings())
    if kind == "journal":
        return export_journal(run_folder, config, output_dir)
    if kind == "nf4" and config.quant.type != "nf4":
        raise ConfigError(
            f"a run in {config.quant.type}",
            "a run in nf4",
            "export it with --format native, or bf16",
        )
    found = load_tuned(run_folder)
    runtime = pipeline.find_runtime(config)
    export_gguf.check_base(kind, options, config, runtime.folder)
    # encoded first, so that encoders and transformer are never in memory together
    compared = compared_inputs(config, runtime) if kind == "lora" else None
    transformer, scales = pipeline.load_scales(config, runtime)
    found.check(frozen_fingerprint(transformer, scales))
    tuned = found.over(scales)
    notes, family = [], pipeline.family_of(config, runtime.folder)
    if kind in ("bf16", "lora", "gguf"):
        notes.append(_levels(config, runtime))
    facts = published_facts(found.facts)
    base = export_gguf.quantization_in_words(config, runtime.folder)
    export = Export(run_folder, config, kind, facts, notes, layout, family, base)
    if kind == "bf16" and family.denoiser.layout is None and "original" in export.layouts:
        raise ConfigError(
            f"--layout {layout} of a model of {family.title}",
            "diffusers, which ComfyUI reads as well",
            "leave --layout out",
        )
    if compared is not None:
        tensors, figures = lora(transformer, family, scales, tuned, rank, compared)
        return _write_lora(export, tensors, figures, runtime, output_dir)
    if kind == "delta":
        files = {
            SCALES: (
                {name: Pending.of(one) for name, one in shrunk(scales, tuned).items()},
                _delta_facts(export.facts),
            )
        }
        return _write(export, files, {}, output_dir)
    merge_changes_(scales, [(tuned, 1.0)])
    if kind == "gguf":
        return _write_gguf(export, transformer, runtime, options, output_dir)
    return _write(export, *_model_files(export, transformer, runtime), output_dir)


def _write_lora(
    export: Export,
    tensors: dict[str, Pending],
    figures: Mapping[str, Any],
    runtime: pipeline.Runtime,
    target: Path,
) -> dict[str, Any]:
    config = _plain_config(export, runtime)
    facts = _file_facts(export, config, runtime)
    facts["modelspec.architecture"] += "/lora"
    facts |= {f"qzo.{name}": f"{figure:.6g}" for name, figure in figures.items()}
    export = replace(export, notes=[in_words(figures), *export.notes])
    written = _write(export, {LORA_FILE: (tensors, facts)}, {}, target)
    report(in_words(figures))
    return written | dict(figures)


def _levels(config: Config, runtime: pipeline.Runtime) -> str:
    """Explain how ComfyUI samples as the run did, if tuned scales serve at some levels only."""
    levels = config.sample.tuned_between
    if levels is None:
        return ""
    family = pipeline.family_of(config, runtime.folder)
    pipeline.resolve_sampling_(config, family, runtime.folder)
    _, tokens = sizes(config, pipeline.shape_of(config, runtime))
    shift = family.sampling.shift(load_scheduler(runtime.folder, family), tokens)
    return in_comfyui(levels, config.sample.steps or 1, shift)


def _model_files(
    export: Export, transformer: nn.Module, runtime: pipeline.Runtime
) -> tuple[dict[str, tuple[dict[str, Pending], dict[str, str]]], dict[str, Any]]:
    """Return tensors and metadata by file name, and the config beside them."""
    config = _plain_config(export, runtime)
    if export.kind == "bf16":
        tensors = as_convolutions(
            transformer, pending_dequantized(transformer, torch.bfloat16), torch.bfloat16
        )
        files: dict[str, tuple[dict[str, Pending], dict[str, str]]] = {}
        if "diffusers" in export.layouts:
            files[DIFFUSERS_FILE] = (tensors, _file_facts(export, config, runtime))
        own = pipeline.family_of(export.config, runtime.folder).denoiser.layout
        if "original" in export.layouts and own is not None:
            facts = _file_facts(export, config, runtime, original=True)
            files[ORIGINAL_FILE] = (own.to_original(tensors, config), facts)
        return files, config if "diffusers" in export.layouts else {}
    facts = _file_facts(export, config, runtime)
    found = find_transformer(pipeline.transformer_place(export.config, runtime.folder))
    if any(entry.rotation is not None for entry in found.entries.values()):
        tuned = {handle.name: handle.scales for handle in handles_of(transformer)}
        config["quantization_config"] = found.config["quantization_config"]
        return {DIFFUSERS_FILE: (sdnq.pending_tensors(found.entries, tuned), facts)}, config
    config["quantization_config"] = quantization_config(
        transformer, export.config.quant.type, devices.dtype_name(runtime.dtype)
    )
    tensors = as_convolutions(transformer, pending_tensors(transformer), runtime.dtype)
    return {DIFFUSERS_FILE: (tensors, facts)}, config


def _plain_config(export: Export, runtime: pipeline.Runtime) -> dict[str, Any]:
    """Return the config of the transformer without quantization, for others."""
    found = find_transformer(pipeline.transformer_place(export.config, runtime.folder)).config
    kept = {name: found[name] for name in found if name != "quantization_config"}
    config: dict[str, Any] = published(kept)
    return config


def _file_facts(
    export: Export,
    config: Mapping[str, Any],
    runtime: pipeline.Runtime,
    original: bool = False,
) -> dict[str, str]:
    """Return the metadata of a safetensors file."""
    family = pipeline.family_of(export.config, runtime.folder)
    side, name = native_resolution(runtime.folder, family), family.architecture(config)
    source = family.source if original else DIFFUSERS
    spec = modelspec(name, export.title, export.base.name, side, implementation=source)
    return spec | export.facts | {"qzo.format": f"{export.kind}/1"}


def _write(
    export: Export,
    files: Mapping[str, tuple[Mapping[str, Pending], Mapping[str, str]]],
    config: Mapping[str, Any],
    target: Path,
) -> dict[str, Any]:
    size = sum(tensor.nbytes for tensors, _ in files.values() for tensor in tensors.values())
    check_room(target, size)

    def fill(folder: Path) -> None:
        for name, (tensors, facts) in files.items():
            with Progress(
                total=2 * _bytes(tensors),
                desc=f"write and compare {name}",
                unit="B",
                unit_scale=True,
                leave=False,
            ) as bar:
                write_tensors(folder / name, tensors, facts, bar.update)
                compare_tensors(folder / name, tensors, bar.update)
        if config:
            (folder / "config.json").write_text(
                json.dumps(config, indent=2) + "\n", encoding="utf-8"
            )
        export.describe(folder)

    write_folder(target, fill)
    return {
        "export": str(target),
        "format": export.kind,
        "bytes": size,
        "files": sorted(path.name for path in target.iterdir()),
    }


def _write_gguf(
    export: Export,
    transformer: nn.Module,
    runtime: pipeline.Runtime,
    options: GgufOptions,
    target: Path,
) -> dict[str, Any]:
    written = export_gguf.Written(export.config, runtime.folder, transformer, options)
    check_room(target, written.most_bytes())

    def fill(folder: Path) -> None:
        said = written.into(folder)
        replace(export, notes=[said, *export.notes]).describe(folder)
        report(said)

    write_folder(target, fill)
    files = sorted(path.name for path in target.iterdir())
    size = sum((target / name).stat().st_size for name in files)
    facts = {"export": str(target), "format": export.kind, "bytes": size, "files": files}
    return facts | written.figures


def _delta_facts(facts: Mapping[str, str]) -> dict[str, str]:
    return {**facts, "qzo.format": provenance.DELTA_FORMAT}


def _bytes(tensors: Mapping[str, Pending]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
