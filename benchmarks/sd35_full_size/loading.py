"""Stages shards, load and restart: 16 GB of bf16 to 4.8 GB in memory and on disk, and from there
again.
"""

import gc
import json
import math
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.sd35_full_size.model import (
    config_of,
    import_everything,
    load_model,
    need_disk,
    status,
    write_synthetic,
)


def shards(folder: Path, layers: int) -> dict[str, Any]:
    from qzo_diffusion.diffusion.transformer import empty_transformer

    config = config_of(layers)
    model = empty_transformer(config)
    need_disk(folder, 2.1e-9 * sum(tensor.numel() for tensor in model.state_dict().values()))
    started = time.perf_counter()
    place = folder / "transformer"
    count = write_synthetic(model, place, "diffusion_pytorch_model")
    (place / "config.json").write_text(json.dumps(config, indent=1))
    return {"parameters": count, "seconds": round(time.perf_counter() - started, 1)}


def load(folder: Path, layers: int) -> dict[str, Any]:
    need_disk(folder, 0.13 * layers)
    import_everything()
    imports = status("VmRSS")
    shutil.rmtree(folder / "copies", ignore_errors=True)
    started = time.perf_counter()
    model = load_model(folder, folder / "copies")
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


def restart(folder: Path, rounds: int = 3) -> dict[str, Any]:
    import_everything()
    (file,) = (folder / "copies").rglob("*.safetensors")
    load_model(folder, folder / "copies")  # into the page cache, for both sides
    loads, reads = [], []
    for _ in range(rounds):
        started = time.perf_counter()
        data = file.read_bytes()
        reads.append(time.perf_counter() - started)
        del data
        started = time.perf_counter()
        model = load_model(folder, folder / "copies")
        loads.append(time.perf_counter() - started)
        del model
        gc.collect()
    return {
        "second_start_over_read": round(statistics.median(loads) / statistics.median(reads), 3),
        "second_start_seconds": round(statistics.median(loads), 2),
        "read_seconds": round(statistics.median(reads), 2),
        "second_start_bytes": file.stat().st_size,
    }
