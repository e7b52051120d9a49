"""The memory that a run needed, as its page shows it."""

from pathlib import Path
from typing import Any

import torch

from qzo_diffusion import devices
from qzo_diffusion.system.reading import read_json
from qzo_diffusion.train.run_folder import RunFolder

FILE = "usage.json"


def record(out: RunFolder, device: torch.device) -> None:
    """Bring usage.json up to date: the peak over all processes that went on with this run."""
    peak = devices.peak_bytes(device)
    if peak is None:
        return
    of, before = device.type, read(out.path)
    if before.get("of") == of:
        peak = max(peak, before["peak_memory_bytes"])
    out.write_json(FILE, {"peak_memory_bytes": peak, "of": of})


def read(folder: Path) -> dict[str, Any]:
    """Empty where there is none, or none that can be read: no run is stopped for it."""
    try:
        found = read_json(folder / FILE)
        return {"peak_memory_bytes": int(found["peak_memory_bytes"]), "of": str(found["of"])}
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return {}
