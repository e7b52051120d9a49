"""The result file everyday.json, which several benchmarks write a part of."""

import json
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, provenance, write_results

NAME = "everyday"


def record(part: str, figures: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Put the figures of one benchmark beside those that are there; `parts` says how each came."""
    file = folder / f"{NAME}.json"
    before = json.loads(file.read_text()) if file.is_file() else {}
    kept = {name: one for name, one in before.items() if name not in provenance()}
    parts = kept.pop("parts", {}) | {part: provenance()}
    return write_results(NAME, kept | figures | {"parts": parts}, folder)
