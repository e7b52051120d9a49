"""Stages shards, load and restart: 16 GB of bf16 to 4.8 GB in memory and on disk, and from there
again.
"""

import gc
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.full_size import loading
from benchmarks.full_size.model import Subject
from benchmarks.sd35_full_size.model import LARGE, import_everything, load_model


def shards(folder: Path, layers: int) -> dict[str, Any]:
    return loading.shards(_subject(layers), folder)


def load(folder: Path, layers: int) -> dict[str, Any]:
    return loading.load(_subject(layers), folder)


def _subject(layers: int) -> Subject:
    from qzo_diffusion.diffusion.families.family import Published
    from qzo_diffusion.diffusion.families.sd3 import SD3

    return Subject(SD3, Published(LARGE, {}, {}), layers)


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
