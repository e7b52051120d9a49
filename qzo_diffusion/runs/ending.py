"""Write the last lines of a run: its state, its files, and the commands that come next."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from qzo_diffusion.runs.locate import Kind
from qzo_diffusion.train.stopping import Reason

_LEFT = {"grid": "samples/grid.png", "page": "report.html", "scores": "evaluation.json"}
Ending = Kind | Literal["votes"]
"""The kind of a run, with runs on votes apart: another verb goes on with them."""
# purpose -> command
_NEXT: dict[Ending, Mapping[str, str]] = {
    "style": {
        "score it": "evaluate --run {run}",
        "draw with 0.7 of it": "sample --run {run} --strength 0.7 --prompt TEXT --output-dir DIR",
        "use it in ComfyUI": "export --run {run} --format bf16 --layout original --output-dir DIR",
    },
    "llm": {
        "score it": "llm evaluate --run {run}",
        "look at it": "report --run {run}",
        "load it elsewhere": "export --run {run} --format native --output-dir DIR",
    },
}
_LIMITS: dict[Reason, str] = {
    "patience": "train.patience; --resume goes on with a higher one",
    "time": "train.max_minutes; --resume goes on",
    "person": "a person; the same command goes on",
}
_GO_ON: dict[Ending, str] = {
    "style": "train --resume {run}",
    "llm": "llm train --resume {run}",
    "votes": "vote --run {run}",
}


def last_words(results: Mapping[str, Any], kind: Ending) -> str:
    """Return lines for a person at the end of a run, from `Trainer.results`."""
    found = next_commands(str(results["run"]), kind, results["stopped"])
    commands = [f"  {command}" for command in found.values()]
    if results["stopped"]:
        first = f"stopped at step {results['steps']} of {results['max_steps']}; go on with:"
        return "\n".join([first, *commands, *_figures(results)])
    # the page shows the third
    return "\n".join([f"done: {results['run']}", *_figures(results), "next:", *commands[:2]])


def next_commands(run: str, kind: Ending, stopped: bool) -> dict[str, str]:
    """Return commands by purpose, for a run that was stopped or is finished."""
    place = shlex.quote(run)
    if stopped:
        return {"go on with it": f"qzo-diffuse {_GO_ON[kind].format(run=place)}"}
    return {
        purpose: f"qzo-diffuse {command.format(run=place)}"
        for purpose, command in _NEXT["style" if kind == "votes" else kind].items()
    }


def _figures(results: Mapping[str, Any]) -> list[str]:
    folder = Path(results["run"])
    rows = [
        (name, shlex.quote(str(folder / file)))
        for name, file in _LEFT.items()
        if (folder / file).exists()
    ]
    if loss := results["validation_loss"]:
        rows.append(("held-out loss", f"{loss['start']:.4f} -> {loss['end']:.4f}"))
    for name, score in results.get("scores", {}).items():
        rows.append((name, f"{score['base_mean']:.4f} -> {score['mean']:.4f}"))
    rows += _end(results)
    rows.append(("time", in_words(results["seconds"])))
    if results["peak_memory_gb"] is not None:
        rows.append(("peak memory", f"{results['peak_memory_gb']:.2f} GB"))
    return [f"  {name:14} {text}" for name, text in rows]


def _end(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Why a run ended before its last step, and which step is its result."""
    by, final = results.get("ended_by"), results.get("final_step")
    rows = []
    if by is not None:
        place = f"at step {results['steps']} of {results['max_steps']}"
        rows.append(("ended", f"{place}, by {_LIMITS[by]}"))
    if final not in (None, results["steps"]):
        rows.append(("result", f"step {final}, of the lowest held-out loss"))
    return rows


def in_words(seconds: float) -> str:
    """Return a duration as text: `0.54 s`, `12.5 min`, `3.2 h`."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
