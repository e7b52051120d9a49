"""A cell: one run of `qzo-diffuse llm` in a process of its own, which is ended at the limit and can
be stopped and go on.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from benchmarks.llm_compare.methods import METHODS, Cell, Places, arguments_of
from benchmarks.record import provenance


def run_cell(cell: Cell, places: Places, stop: threading.Event) -> dict[str, Any] | None:
    """The result, which is also written; None when it was stopped, and then the same call goes
    on.
    """
    method, folder = METHODS[cell.method], places.cache / cell.name
    limit = places.minutes * 60
    ended, spent = "budget", _spent(folder)
    if method.trained:
        going = (folder / "metrics.jsonl").exists()
        if not going:  # stopped while it was loading: nothing is lost
            shutil.rmtree(folder, ignore_errors=True)
        where = ["--resume" if going else "--output-dir", str(folder)]
        command = ["train", *arguments_of(cell, places), *where]
        code, output, seconds = _call(command, stop, limit - spent)
        spent += seconds
        _note_spent(folder, spent)
        if code in (130, -signal.SIGTERM) and stop.is_set():
            return None
        if code not in (0, 130) and not _diverged(folder):
            raise RuntimeError(f"{cell.name}: exit code {code}")
        ended = {0: "budget", 130: "time limit"}.get(code, "diverged")
        found = json.loads(output) if output.strip() else {}
    if not method.trained or ended == "time limit":
        newest = (
            max((folder / "checkpoints").glob("step_*"), default=None) if method.trained else None
        )
        where = ["--run", str(newest)] if newest else arguments_of(cell, places)[:-1]
        code, output, seconds = _call(["evaluate", *where, "--json"], stop, limit)
        if code in (130, -signal.SIGTERM) and stop.is_set():
            return None
        if code != 0:
            raise RuntimeError(f"{cell.name}: exit code {code} of evaluate")
        evaluated = json.loads(output)
        found = (
            (found if method.trained else {})
            | evaluated
            | {evaluated["metric"]: {"end": evaluated[evaluated["metric"]]}}
        )
    figure = found.get(found.get("metric", ""), {})
    steps = found.get("steps", 0)
    result = {
        "task": cell.task,
        "method": cell.method,
        "seed": cell.seed,
        "ended": ended,
        "metric": found.get("metric"),
        "value": figure.get("end"),
        "value_at_start": figure.get("start"),
        "test_examples": found.get("test_examples"),
        "validation_loss": found.get("validation_loss"),
        "steps": steps,
        "forwards": steps * method.forwards_of_step,
        "processor_seconds": round(spent, 1),
        "curve": _curve(folder, method.forwards_of_step) if method.trained else [],
        "settings": [one for one in arguments_of(cell, places) if "=" in one],
        "provenance": provenance() | {"command": _command(cell, places)},
    }
    places.result(cell).parent.mkdir(parents=True, exist_ok=True)
    places.result(cell).write_text(json.dumps(result, indent=1) + "\n")
    return result


def _command(cell: Cell, places: Places) -> str:
    chosen = f" --dtype {places.dtype}" if places.dtype else ""
    chosen += "" if places.minutes == Places.minutes else f" --minutes {places.minutes:g}"
    return f"python -m benchmarks.llm_compare run --data FOLDER --cells '{cell.name}'{chosen}"


def dtype_of(result: dict[str, Any]) -> str:
    """The dtype that a cell ran in: the last of its settings counts."""
    given = [one for one in result.get("settings", ()) if one.startswith("compute.dtype=")]
    return given[-1].partition("=")[2] if given else "its model's"


def _curve(folder: Path, forwards_of_step: int) -> list[tuple[int, float]]:
    """Return (forward passes, held-out loss); first order counts forward and backward passes."""
    metrics = folder / "metrics.jsonl"
    lines = (
        [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    )
    return [
        (line["step"] * forwards_of_step, round(line["validation_loss"], 4))
        for line in lines
        if "validation_loss" in line
    ]


def _diverged(folder: Path) -> bool:
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return bool(lines) and json.loads(lines[-1]).get("skipped", False)


def _call(arguments: list[str], stop: threading.Event, limit: float) -> tuple[int, str, float]:
    """Exit code, stdout and processor seconds of `qzo-diffuse llm ...`; ended after its step when
    asked to, or at the limit.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "qzo_diffusion.cli", "llm", *arguments],
        stdout=subprocess.PIPE,
        text=True,
    )
    while True:
        try:
            output, _ = process.communicate(timeout=1)
            break
        except subprocess.TimeoutExpired:
            if stop.is_set() or _processor_seconds(process.pid) > limit:
                process.send_signal(signal.SIGTERM)
                output, _ = process.communicate()
                break
    return process.returncode, output, _children_seconds()


_before = 0.0


def _children_seconds() -> float:
    """Of the processor, of children that ended since the last call."""
    global _before
    times = os.times()
    total, before = times.children_user + times.children_system, _before
    _before = total
    return total - before


def _processor_seconds(process: int) -> float:
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _spent(folder: Path) -> float:
    path = folder.with_suffix(".seconds")
    return float(path.read_text()) if path.exists() else 0.0


def _note_spent(folder: Path, seconds: float) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.with_suffix(".seconds").write_text(str(seconds))
