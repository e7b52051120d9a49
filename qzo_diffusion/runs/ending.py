"""The last words of a run: where it stands, what it left, and the commands that come next."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qzo_diffusion.runs.locate import Kind

_LEFT = {"grid": "samples/grid.png", "page": "report.html", "scores": "evaluation.json"}
_NEXT: dict[Kind, Sequence[str]] = {
    "style": (
        "evaluate --run {run}",
        "sample --run {run} --strength 0.7 --prompt TEXT --output-dir DIR",
    ),
    "llm": ("llm evaluate --run {run}", "report --run {run}"),
}
_TRAIN: dict[Kind, str] = {"style": "train", "llm": "llm train"}


def last_words(results: Mapping[str, Any], kind: Kind) -> str:
    """Lines for a person at the end of a run, from `Trainer.results`."""
    run = shlex.quote(str(results["run"]))
    if results["stopped"]:
        first = f"stopped at step {results['steps']} of {results['max_steps']}; go on with:"
        return "\n".join(
            [first, f"  qzo-diffuse {_TRAIN[kind]} --resume {run}", *_figures(results)]
        )
    commands = [f"  qzo-diffuse {command.format(run=run)}" for command in _NEXT[kind]]
    return "\n".join([f"done: {results['run']}", *_figures(results), "next:", *commands])


def _figures(results: Mapping[str, Any]) -> list[str]:
    folder = Path(results["run"])
    rows = [(name, str(folder / file)) for name, file in _LEFT.items() if (folder / file).exists()]
    if loss := results["validation_loss"]:
        rows.append(("held-out loss", f"{loss['start']:.4f} -> {loss['end']:.4f}"))
    rows.append(("time", in_words(results["seconds"])))
    if results["peak_memory_gb"] is not None:
        rows.append(("peak memory", f"{results['peak_memory_gb']:.2f} GB"))
    return [f"  {name:14} {text}" for name, text in rows]


def in_words(seconds: float) -> str:
    """A duration: `0.54 s`, `12.5 min`, `3.2 h`."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
