"""Run the stages of a benchmark of whole models."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def run_apart(
    module: str, stages: Sequence[str], folder: Path, layers: int, options: Sequence[str]
) -> dict[str, Any]:
    """Run each stage in a process of its own, as the peak of one must not hide that of another.

    Figures are kept in the folder, so that a run that was stopped goes on.

    Args:
        module: whose command line takes --in-process, and then prints a stage's figures as JSON.
        options: of its command line, beside stage, folder and layers.
    """
    file = folder / "figures.json"
    figures = json.loads(file.read_text()) if file.is_file() else {}
    if figures.get("layers") not in (None, layers):
        sys.exit(f"{folder} holds {figures['layers']} layers; give another --folder or remove it")
    given = ["--folder", str(folder), "--layers", str(layers), *options]
    for stage in stages:
        command = [sys.executable, "-m", module, "--in-process", "--stages", stage, *given]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        figures |= {"layers": layers, stage: json.loads(output.strip().splitlines()[-1])}
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(figures, indent=1))
        print(stage, figures[stage], file=sys.stderr)
    return figures
