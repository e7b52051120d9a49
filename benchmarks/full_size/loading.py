"""Stages shards and load: bf16 in shards to the 4-bit model in memory, and its copy on disk."""

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.full_size.model import Subject, import_everything, load_model
from benchmarks.full_size.weights import need_disk, status, write_synthetic


def shards(subject: Subject, folder: Path) -> dict[str, Any]:
    model = subject.empty()
    need_disk(folder, 2.1e-9 * sum(tensor.numel() for tensor in model.state_dict().values()))
    started = time.perf_counter()
    place = folder / subject.family.denoiser.part
    count = write_synthetic(model, place, "diffusion_pytorch_model")
    (place / "config.json").write_text(json.dumps(subject.config, indent=1))
    return {"parameters": count, "seconds": round(time.perf_counter() - started, 1)}


def load(subject: Subject, folder: Path, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    count = sum(tensor.numel() for tensor in subject.empty().parameters())
    need_disk(folder, 0.62e-9 * count)
    import_everything(subject.config)
    imports = status("VmRSS")
    shutil.rmtree(folder / "copies", ignore_errors=True)
    started = time.perf_counter()
    model = load_model(subject.family, folder, folder / "copies", dtype)
    return {
        "load_peak_rss_gb": round(status("VmHWM"), 3),
        "load_imports_gb": round(imports, 3),
        "load_resident_gb": round(status("VmRSS"), 3),
        "load_and_store_seconds": round(time.perf_counter() - started, 1),
        "stored_gb": round(
            sum(f.stat().st_size for f in (folder / "copies").rglob("*.safetensors")) / 1e9, 3
        ),
        "logical_parameters": logical_parameters(model),
    }


def logical_parameters(model: nn.Module) -> int:
    """A 4-bit weight counts as the numbers that it stands for."""
    total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        total += parameter.numel() if state is None else math.prod(state.shape)
    return total
