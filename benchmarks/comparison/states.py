"""What few bits of Adam's moments cost: the same run by exact gradients with each number of bits.

The run tunes the scales of `tiny` on the demo's drawings for 200 steps. `gain_share` is its gain in
held-out loss over that of the 32-bit run, `memory_ratio` the bytes of the state in its checkpoint
over those of the 32-bit one."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from qzo_diffusion import resources

STEPS, BITS = 200, (32, 8, 4, 3, 2)
STATE = "optimizer.safetensors"
DRAWINGS = resources.PACKAGE / "demo_images" / "fluent_mono"
SETTINGS = [
    "--model",
    "tiny",
    "--method",
    "fo-scales",
    "--style-dir",
    str(DRAWINGS / "train"),
    "--validation-dir",
    str(DRAWINGS / "held_out"),
    "--max-steps",
    str(STEPS),
    "train.lr=3e-3",
    "data.batch_size=4",
    f"train.checkpoint_every={STEPS}",
    "train.validate_every=0",
    "sample.every=0",
    "sample.steps=2",
]


def measure(cache: Path, wanted: Sequence[int] = BITS) -> dict[str, dict[str, float]]:
    """bits -> figures, of 32 bits and of those that are wanted.

    Folders of runs stay in `cache`; one that is there is not run again.
    """
    chosen = [bits for bits in BITS if bits == 32 or bits in wanted]
    runs = {bits: _run(bits, cache / f"{bits}_bits") for bits in chosen}
    return {str(bits): _figures(run, runs[32]) for bits, run in runs.items()}


def _figures(run: dict[str, float], exact: dict[str, float]) -> dict[str, float]:
    gain = run["start"] - run["end"]
    return {
        "gain_share": round(gain / (exact["start"] - exact["end"]), 4),
        "memory_ratio": round(run["bytes"] / exact["bytes"], 4),
        "validation_loss_at_start": round(run["start"], 6),
        "validation_loss": round(run["end"], 6),
    }


def _run(bits: int, folder: Path) -> dict[str, float]:
    if not (folder / "final").exists():
        command = [sys.executable, "-m", "qzo_diffusion.cli", "train", *SETTINGS]
        own = ["--output-dir", str(folder), f"train.state_bits={bits}"]
        subprocess.run([*command, *own], check=True)
    losses = _losses(folder)
    bytes_of_state = _bytes(folder / "checkpoints" / f"step_{STEPS:06d}" / STATE)
    return {"start": losses[0], "end": losses[STEPS], "bytes": bytes_of_state}


def _losses(folder: Path) -> dict[int, float]:
    lines: list[dict[str, Any]] = [
        json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    return {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}


def _bytes(path: Path) -> int:
    with safe_open(path, framework="pt") as file:
        return sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
