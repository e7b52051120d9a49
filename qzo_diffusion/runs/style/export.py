"""Export a run's tuned model for `qzo-diffuse export` in a form that other programs load.

Everything is written into a temporary folder, read back and compared bit for bit. Only then it gets
its name, so a kill leaves no export. Tensors are computed and written one by one, so memory never
holds a second model."""

import contextlib
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from tqdm import tqdm

from qzo_diffusion import __version__, devices
from qzo_diffusion.config.files import load_config
from qzo_diffusion.config.style import Config
from qzo_diffusion.core.delta import shrunk
from qzo_diffusion.core.errors import ConfigError, OutputError
from qzo_diffusion.core.journal import Journal, encoded, read_journal
from qzo_diffusion.core.journal_format import NoteEntry
from qzo_diffusion.core.merge import merge_changes_
from qzo_diffusion.diffusion import sd3
from qzo_diffusion.diffusion.levels import in_comfyui
from qzo_diffusion.diffusion.model_card import Base, Scores, card, modelspec
from qzo_diffusion.diffusion.original_layout import to_original
from qzo_diffusion.diffusion.transformer import find_transformer
from qzo_diffusion.evaluate.report import figure, figure_rows, interval
from qzo_diffusion.evaluate.verdict import verdict
from qzo_diffusion.quant.bnb import quantization_config
from qzo_diffusion.quant.load import frozen_fingerprint
from qzo_diffusion.quant.stored import pending_dequantized, pending_tensors
from qzo_diffusion.quant.weights import Pending, compare_tensors, write_tensors
from qzo_diffusion.runs import provenance
from qzo_diffusion.runs.locate import locate
from qzo_diffusion.runs.publish import (
    base_id,
    published,
    published_config,
    published_facts,
    published_model,
    published_text,
)
from qzo_diffusion.runs.style import pipeline
from qzo_diffusion.runs.tuned import load_tuned
from qzo_diffusion.system.files import (
    SCALES,
    check_new,
    finite,
    free_bytes,
    write_folder,
    write_whole,
)
from qzo_diffusion.system.reading import parse_json, read_json, read_json_lines

Format = Literal["nf4", "bf16", "delta", "journal", "native"]
DIFFUSERS_FILE, ORIGINAL_FILE = "diffusion_pytorch_model.safetensors", "original_layout.safetensors"
JOURNAL = "journal.qzo"

NEEDS_GPU = (
    'diffusers loads 4-bit folders on a GPU only; elsewhere it stops with "No GPU found". Without '
    "one, take an export in bf16, or sample with qzo-diffuse."
)
USE: dict[Format, str] = {
    "nf4": "A diffusers transformer in bitsandbytes' 4-bit layout, the size of the 4-bit base:\n\n"
    '```python\ntransformer = SD3Transformer2DModel.from_pretrained("this folder", '
    "dtype=torch.bfloat16)\n```\n\n"
    "Give it to `StableDiffusion3Pipeline.from_pretrained(base, transformer=transformer)`. "
    f"{NEEDS_GPU}",
    "bf16": f"`{DIFFUSERS_FILE}` with `config.json` is a diffusers transformer in bfloat16. "
    f"`{ORIGINAL_FILE}` holds the\nsame numbers in the layout that Stability AI "
    "publishes, which ComfyUI (`models/diffusion_models/`) and sd-scripts read.",
    "delta": "The changes of the scales alone, to be applied to the base model:\n\n"
    "```\nqzo-diffuse sample --run THIS_FOLDER --strength 0.8 --prompts FILE --output-dir DIR\n```",
    "journal": "The seeds and scalars of every step. They rebuild the tuned scales of any step "
    "over the base model:\n\n"
    "```\nqzo-diffuse replay --journal journal.qzo --output-dir DIR\n```",
    "native": "A diffusers transformer in the quantizer's own layout; load it with "
    f"`SD3Transformer2DModel.from_pretrained`. {NEEDS_GPU}",
}


@dataclass(frozen=True)
class _Export:
    """A run, its tuned model if the format needs one, and the metadata of every file."""

    run: Path
    config: Config
    kind: Format
    facts: dict[str, str]
    note: str = ""

    @property
    def title(self) -> str:
        return published_text(locate(self.run).run().name)

    @property
    def base(self) -> Base:
        model = self.config.model
        return Base(published_model(model), base_id(model))


def run(run_folder: Path, kind: Format, output_dir: Path) -> dict[str, Any]:
    """Write `output_dir`; return the figures for `--json`.

    Raises:
        OutputError: `output_dir` exists, the disk has no room, or the export reads back different.
        ModelError, ConfigError, JournalError: the run and the format or the base don't fit
            together.
    """
    check_new(output_dir)
    config: Config = load_config(locate(run_folder).need("style").settings())
    if kind == "journal":
        return _export_journal(run_folder, config, output_dir)
    if kind == "nf4" and config.quant.type != "nf4":
        raise ConfigError(
            f"a run in {config.quant.type}",
            "a run in nf4",
            "export it with --format native, or bf16",
        )
    found = load_tuned(run_folder)
    runtime = pipeline.find_runtime(config)
    transformer, scales, _ = pipeline.load_base(config, runtime)
    found.check(frozen_fingerprint(transformer, scales))
    tuned = found.over(scales)
    note = _levels(config, runtime) if kind == "bf16" else ""
    export = _Export(run_folder, config, kind, published_facts(found.facts), note)
    if kind == "delta":
        files = {
            SCALES: (
                {name: Pending.of(one) for name, one in shrunk(scales, tuned).items()},
                _delta_facts(export.facts),
            )
        }
        return _write(export, files, {}, output_dir)
    merge_changes_(scales, [(tuned, 1.0)])
    return _write(export, *_model_files(export, transformer, runtime), output_dir)


def _levels(config: Config, runtime: pipeline.Runtime) -> str:
    """Explain how ComfyUI samples as the run did, if tuned scales serve at some levels only."""
    levels = config.sample.tuned_between
    if levels is None:
        return ""
    pipeline.resolve_sampling_(config, runtime.folder)
    shift = sd3.load_scheduler(runtime.folder).config.shift
    return in_comfyui(levels, config.sample.steps or 1, shift)


def _model_files(
    export: _Export, transformer: nn.Module, runtime: pipeline.Runtime
) -> tuple[dict[str, tuple[dict[str, Pending], dict[str, str]]], dict[str, Any]]:
    """Return tensors and metadata by file name, and the config beside them."""
    found = find_transformer(pipeline.transformer_place(export.config, runtime.folder)).config
    kept = {name: found[name] for name in found if name != "quantization_config"}
    config = {"_class_name": "SD3Transformer2DModel"} | published(kept)
    side = sd3.native_resolution(runtime.folder)
    own = {**export.facts, "qzo.format": f"{export.kind}/1"}

    def facts(original: bool) -> dict[str, str]:
        return (
            modelspec(config, export.title, export.base.name, side, original_layout=original) | own
        )

    if export.kind == "bf16":
        tensors = pending_dequantized(transformer, torch.bfloat16)
        original = {ORIGINAL_FILE: (to_original(tensors, config), facts(True))}
        return {DIFFUSERS_FILE: (tensors, facts(False))} | original, config
    config["quantization_config"] = quantization_config(
        transformer, export.config.quant.type, devices.dtype_name(runtime.dtype)
    )
    return {DIFFUSERS_FILE: (pending_tensors(transformer), facts(False))}, config


def _write(
    export: _Export,
    files: Mapping[str, tuple[Mapping[str, Pending], Mapping[str, str]]],
    config: Mapping[str, Any],
    target: Path,
) -> dict[str, Any]:
    size = sum(tensor.nbytes for tensors, _ in files.values() for tensor in tensors.values())
    _check_room(target, size)

    def fill(folder: Path) -> None:
        for name, (tensors, facts) in files.items():
            with tqdm(
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
        _describe(export, folder)

    write_folder(target, fill)
    return {
        "export": str(target),
        "format": export.kind,
        "bytes": size,
        "files": sorted(path.name for path in target.iterdir()),
    }


def _export_journal(run_folder: Path, config: Config, target: Path) -> dict[str, Any]:
    """Copy the journal up to its last whole step, which was checked on reading.

    If its header or a note names a local path, it is rewritten without, in a new chain.
    """
    source = locate(run_folder).run() / JOURNAL
    journal = read_journal(source)
    data = _published_journal(source, journal)
    export = _Export(run_folder, config, "journal", {"qzo.steps": str(journal.steps_done)})

    def fill(folder: Path) -> None:
        write_whole(folder / JOURNAL, data)
        if read_journal(folder / JOURNAL).steps_done != journal.steps_done:
            raise OutputError(
                f"{folder / JOURNAL} is not what was copied",
                "the same journal",
                "stop the run first, or try again",
            )
        _describe(export, folder)

    write_folder(target, fill)
    size = (target / JOURNAL).stat().st_size
    return {"export": str(target), "format": "journal", "bytes": size, "steps": journal.steps_done}


def _published_journal(source: Path, journal: Journal) -> bytes:
    header = published(journal.header)
    notes = {
        index: replace(entry, content=published(entry.content))
        for index, entry in enumerate(journal.entries)
        if isinstance(entry, NoteEntry)
    }
    if header == journal.header and all(journal.entries[at] == one for at, one in notes.items()):
        return source.read_bytes()[: journal.size]
    return encoded(header, (notes.get(at, one) for at, one in enumerate(journal.entries)))


def _describe(export: _Export, folder: Path) -> None:
    """Write settings, samples and the model card beside the export."""
    (
        folder / "config.yaml" if export.kind in ("delta", "journal") else folder / "run.yaml"
    ).write_text(published_config(export.config), encoding="utf-8")
    pictures = []
    if (grid := locate(export.run).run() / "samples" / "grid.png").is_file():
        shutil.copyfile(grid, folder / "samples.png")
        pictures.append("samples.png")
    data, train, qzo = export.config.data, export.config.train, export.config.qzo
    settings = {
        "steps": export.facts.get("qzo.steps", train.max_steps),
        "images a step": data.batch_size,
        "trained numbers": qzo.parametrization,
        "rate": f"{train.lr}, {train.schedule}",
        "eps": qzo.eps,
        "quantization": f"{export.config.quant.type}, blocks of {export.config.quant.blocksize}",
        "made with": f"qzo_diffusion {__version__}",
    }
    settings |= {"trigger": data.trigger} if data.trigger else {}
    use = f"{USE[export.kind]}\n\n{export.note}" if export.note else USE[export.kind]
    text = card(export.title, export.base, use, settings, _scores(export), pictures)
    (folder / "README.md").write_text(text, encoding="utf-8")


def _scores(export: _Export) -> Scores:
    """Return the evaluation of these very scales, or else the held-out losses of the run itself."""
    folder, step = locate(export.run).run(), int(export.facts.get("qzo.steps", 0))
    for file in (folder / "evaluation.json", folder / f"evaluation_step_{step:06d}.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = finite(read_json(file))
            if found["step"] == step:
                return _evaluated(found)
    return _held_out(folder, step)


def _evaluated(found: Mapping[str, Any]) -> Scores:
    try:
        rows, said = [_cells(row) for row in figure_rows(found)], verdict(found)[0]["text"]
    except (KeyError, TypeError):  # written by another version: read the common part
        return Scores([_cells(row) for row in _plain_rows(found)])
    by = found["scorer"]["note"] or found["scorer"]["name"]
    against = found.get("compared_with", "the base")
    remark = f"By {by}, on {found['clip_score']['n']} prompts; changes are to {against}."
    return Scores(rows, said, remark)


def _plain_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"name": name.replace("_", " "), "base": one.get("base_mean"), "tuned": one["mean"]}
        | {"delta": one.get("delta"), "ci95": one.get("delta_ci95")}
        for name, one in found.items()
        if isinstance(one, Mapping) and "mean" in one
    ]


def _cells(row: Mapping[str, Any]) -> list[str]:
    states = [figure(row[state]) for state in ("base", "tuned")]
    return [row["name"], *states, figure(row["delta"], True), interval(row["ci95"])]


def _held_out(folder: Path, step: int) -> Scores:
    losses: dict[int, float] = {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        for line in read_json_lines(folder / "metrics.jsonl"):
            if b'"validation_loss"' in line:
                entry = parse_json(line)
                losses[int(entry["step"])] = float(entry["validation_loss"])
    if step not in losses:
        return Scores()
    base, tuned = losses[min(losses)], losses[step]
    row = ("held-out loss", figure(base), figure(tuned), figure(tuned - base, True), "–")
    diverged = "" if math.isfinite(tuned) else "The run diverged: this loss is no finite number."
    return Scores([row], diverged)


def _delta_facts(facts: Mapping[str, str]) -> dict[str, str]:
    return {**facts, "qzo.format": provenance.DELTA_FORMAT}


def _check_room(target: Path, size: int) -> None:
    free = free_bytes(target)
    if free < 1.02 * size:
        got = f"{free / 1e9:.1f} GB free for an export of {size / 1e9:.1f} GB"
        raise OutputError(
            got, "room for the export", "free some space, or choose another --output-dir"
        )


def _bytes(tensors: Mapping[str, Pending]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
