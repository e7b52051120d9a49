"""The file that the checks of families and the proofs at full size share."""

from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, write_results
from qzo_diffusion.system.reading import read_json

PARTS = ("families", "full_size")


def record(part: str, name: str, figures: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write a family's figures into one part of families.json; everything else stays."""
    file = folder / "families.json"
    before = read_json(file) if file.is_file() else {}
    kept = {key: dict(before.get(key, {})) for key in PARTS}
    kept[part][name] = figures
    return write_results("families", {key: kept[key] for key in PARTS if kept[key]}, folder)
