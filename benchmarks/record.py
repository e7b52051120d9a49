"""What every benchmark writes beside its figures: command, date, machine, versions, revision."""

import json
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "diffusers", "transformers", "bitsandbytes", "numpy")


def provenance() -> dict[str, Any]:
    changed = _git("status", "--porcelain", "--untracked-files=no")
    revision = _git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    # Folders of one machine are of no use on another, and what they hold is described in the
    # documentation.
    arguments = [
        "FOLDER" if Path(argument).is_absolute() else argument for argument in sys.argv[1:]
    ]
    return {
        "command": " ".join(["python", "-m", _module_name(), *arguments]),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in PACKAGES},
        "git_revision": revision,
    }


def _git(*arguments: str) -> str:
    """What git prints; nothing outside a clone."""
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def write_results(name: str, figures: dict[str, Any], folder: Path = RESULTS) -> Path:
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(provenance() | figures, indent=1) + "\n")
    return path


def update_results(
    name: str,
    part: str,
    figures: dict[str, Any],
    details: dict[str, Any],
    folder: Path = RESULTS,
) -> Path:
    """Write the part that one benchmark measures of a file that several write; the others stay.

    Args:
        figures: keys of the whole file. details: of this part, beside its command and machine.
    """
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text()) if path.exists() else {}
    parts = before.pop("parts", {}) | {part: provenance() | details}
    path.write_text(json.dumps(before | figures | {"parts": parts}, indent=1) + "\n")
    return path


def _module_name() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).name


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def put_between_markers(text: str, content: str, begin: str, end: str) -> str:
    """Raises ValueError when a marker is not there."""
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"{begin} and {end} must both be in the document")
    return f"{before}{begin}\n{content}\n{end}{after}"
