"""Find the scores that the card of an export states: those of the exported scales alone."""

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qzo_diffusion.diffusion.model_card import Scores
from qzo_diffusion.evaluate.report_figures import figure, figure_rows, interval
from qzo_diffusion.evaluate.verdict import verdict
from qzo_diffusion.runs.locate import locate
from qzo_diffusion.system.files import finite
from qzo_diffusion.system.reading import parse_json, read_json, read_json_lines


def scores_of(run: Path, facts: Mapping[str, str]) -> Scores:
    """Return the evaluation of these very scales, or else the held-out losses of the run itself."""
    folder, step = locate(run).run(), int(facts.get("qzo.steps", 0))
    for file in (folder / "evaluation.json", folder / f"evaluation_step_{step:06d}.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = finite(read_json(file))
            if found["step"] == step:
                return _evaluated(found)
    return _held_out(folder, step)


def _evaluated(found: Mapping[str, Any]) -> Scores:
    try:
        rows, said = [_cells(row) for row in figure_rows(found)], verdict(found)[0]["text"]
    except (KeyError, TypeError):  # written by another version: read the common part
        return Scores([_cells(row) for row in _plain_rows(found)])
    by = found["scorer"]["note"] or found["scorer"]["name"]
    against = found.get("compared_with", "the base")
    remark = f"By {by}, on {found['clip_score']['n']} prompts; changes are to {against}."
    return Scores(rows, said, remark)


def _plain_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"name": name.replace("_", " "), "base": one.get("base_mean"), "tuned": one["mean"]}
        | {"delta": one.get("delta"), "ci95": one.get("delta_ci95")}
        for name, one in found.items()
        if isinstance(one, Mapping) and "mean" in one
    ]


def _cells(row: Mapping[str, Any]) -> list[str]:
    states = [figure(row[state]) for state in ("base", "tuned")]
    return [row["name"], *states, figure(row["delta"], True), interval(row["ci95"])]


def _held_out(folder: Path, step: int) -> Scores:
    losses: dict[int, float] = {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        for line in read_json_lines(folder / "metrics.jsonl"):
            if b'"validation_loss"' in line:
                entry = parse_json(line)
                losses[int(entry["step"])] = float(entry["validation_loss"])
    if step not in losses:
        return Scores()
    base, tuned = losses[min(losses)], losses[step]
    row = ("held-out loss", figure(base), figure(tuned), figure(tuned - base, True), "–")
    diverged = "" if math.isfinite(tuned) else "The run diverged: this loss is no finite number."
    return Scores([row], diverged)
