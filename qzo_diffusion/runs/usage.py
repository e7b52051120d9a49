"""Record the memory that a run needed, for its page."""

from pathlib import Path
from typing import Any

import torch

from qzo_diffusion import devices
from qzo_diffusion.system.reading import read_json
from qzo_diffusion.train.run_folder import RunFolder

FILE = "usage.json"


def record(out: RunFolder, device: torch.device) -> None:
    """Update usage.json: the peak over all processes of this run."""
    peak = devices.peak_bytes(device)
    if peak is None:
        return
    of, before = device.type, read(out.path)
    if before.get("of") == of:
        peak = max(peak, before["peak_memory_bytes"])
    out.write_json(FILE, {"peak_memory_bytes": peak, "of": of})


def read(folder: Path) -> dict[str, Any]:
    """Read usage.json; empty if it is missing or unreadable, which must not stop a run."""
    try:
        found = read_json(folder / FILE)
        return {"peak_memory_bytes": int(found["peak_memory_bytes"]), "of": str(found["of"])}
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return {}
