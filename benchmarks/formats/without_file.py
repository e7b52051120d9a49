"""Formats that have no file of their own: runs on them are exported in bf16, and read by
diffusers."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.formats.runs import (
    FILE,
    STEPS,
    WIDE,
    Tuned,
    by_diffusers,
    distance,
    exported,
    forward,
    run,
    tuned,
)
from qzo_diffusion.quant.stored import pending_dequantized
from tests.small_models import sd3_transformer
from tests.small_pipeline import write_pipeline

READER = "diffusers, of the bf16 export"
KINDS = {"bof4": ("bof4", "bof4s"), "svdquant": ("svdquant",)}
ROUNDING = 12 * 2.0**-9  # relative, of bf16 in a dozen products one behind another


def without_file(images: Path) -> dict[str, dict[str, Any]]:
    """Figures by format, of a run of `STEPS` steps on captioned images for each of its types."""
    figures = {}
    for types in KINDS.values():
        for of in types:
            with tempfile.TemporaryDirectory() as place:
                figures[of] = _compared(Path(place), of, images)
            print(of, figures[of], flush=True)
    return figures


def _compared(folder: Path, of: str, images: Path) -> dict[str, Any]:
    place = write_pipeline(folder / "pipeline")
    sd3_transformer(layers=2, width=WIDE).save_pretrained(place / "transformer")
    trained = run(folder, place, images, STEPS, f"quant.type={of}", "quant.backend=reference")
    here, target = tuned(trained), exported(trained, "bf16")
    off = distance(forward(by_diffusers(target)), forward(here.model))
    return {
        "roundtrip_identical": None,
        "forward_equal": off < ROUNDING,
        "forward_off": off,
        "change_kept": _change_kept(here, load_file(target / FILE)),
    }


def _change_kept(run: Tuned, file: dict[str, Tensor]) -> float:
    """Σ c·k / Σ c·c of changes c of all weights, where the file holds k."""
    after = {name: one.make() for name, one in _weights(run)}
    for name, live in run.scales.items():
        live.copy_(run.base[name])
    kept = whole = 0.0
    for name, one in _weights(run):
        base = one.make().double()
        change = after[name].double() - base
        kept += float((change * (file[name].double() - base)).sum())
        whole += float(change.square().sum())
    return round(kept / whole, 4)


def _weights(run: Tuned) -> Any:
    return pending_dequantized(run.model, torch.float32).items()
