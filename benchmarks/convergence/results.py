"""Finished cells: those of a folder, and those that are recorded in the repository."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.convergence.methods import FAMILIES, Families, Family
from benchmarks.record import RESULTS
from qzo_diffusion.system.reading import read_json

RECORDED = RESULTS / "convergence_cells.json"
Result = dict[str, Any]
Results = dict[str, Result]
"""By the cell's name."""


def results_in(work: Path, families: Families = FAMILIES) -> Results:
    """Those of whole runs by the families' settings; one that diverged has no curve."""
    found = (read_json(path) for path in sorted((work / "cells").glob("*/*.json")))
    return {one["cell"]: one for one in found if _counts(one, families)}


def recorded(file: Path = RECORDED) -> Results:
    """Those in the repository; none without the file."""
    cells = json.loads(file.read_text())["cells"] if file.exists() else []
    return {one["cell"]: one for one in cells if _counts(one, FAMILIES)}


def joined(first: Results, second: Results) -> Results:
    """All of both; where both have a cell the second's, unless the first's pictures alone were
    judged.

    Raises:
        ValueError: cells of one style were trained or judged on other images, or other weights.
    """
    judged = {name for name, one in first.items() if one["pictures"] and name in second}
    whole = first | second | {n: first[n] for n in judged if not second[n]["pictures"]}
    inputs: dict[str, str] = {}
    for name, one in whole.items():
        style = name.partition("/")[0]
        if inputs.setdefault(style, one["inputs"]) != one["inputs"]:
            raise ValueError(
                f"{name} has other images or another model than the other cells of {style}; "
                "run it again, in another work folder"
            )
    return whole


def record(results: Results, file: Path = RECORDED) -> None:
    """Write all, a line each."""
    lines = ",\n".join(json.dumps(results[name]) for name in sorted(results))
    file.write_text(f'{{"cells": [\n{lines}\n]}}\n')


def _counts(result: Result, families: Families) -> bool:
    family = families.get(result.get("family", ""))
    if family is None:
        return False
    now = family.settings | {"train": family.settings["train"] | {"lr": result["lr"]}}
    whole = not result["curve"] or result["curve"][-1][0] == family.passes(family.steps)
    return whole and bool(result["settings"] == json.loads(json.dumps(now)))


def final_losses(results: Results, families: Families = FAMILIES) -> dict[str, float]:
    return {name: loss_of(families[one["family"]], one) for name, one in results.items()}


def loss_of(family: Family, result: Mapping[str, Any]) -> float:
    """The held-out loss that counts: the last, of exact gradients the lowest; infinite where the
    run diverged.
    """
    losses = [math.inf if loss is None else float(loss) for _, loss in result["curve"]]
    if not losses or not math.isfinite(losses[-1]):
        return math.inf
    return min(losses) if family.exact else losses[-1]
