"""The same comparison on any folder of captioned images: the paper's step over a grid of rates
against the default, by itself.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.convergence.cells import Folders, run_cell
from benchmarks.convergence.figures import budget_ratio, share_of_gain, spread
from benchmarks.convergence.methods import (
    FAMILIES,
    FIRST_ORDER,
    REFERENCES,
    best_exponent,
    default_exponent,
    next_exponents,
)
from benchmarks.convergence.settings import DEFAULT, Cell, Family, Method
from benchmarks.convergence.tasks import StyleTask
from benchmarks.record import provenance

Run = Callable[[Method, int], dict[str, Any]]


def compare(style_dir: Path, budget: int, seeds: int, work: Path, cache: Path) -> dict[str, Any]:
    """The figures, with the keys of convergence.json; `work` keeps finished cells, so that the same
    call goes on.

    Args:
        budget: forward passes of a run.
    """
    task, folders = StyleTask(style_dir, None, cache), Folders(work / "cells", work / "checkpoints")
    name = style_dir.resolve().name
    results: dict[str, dict[str, Any]] = {}

    def run(method: Method, seed: int) -> dict[str, Any]:
        cell = Cell(name, method if method.first_order else replace(method, budget=budget), seed)
        path = folders.result(cell)
        known = json.loads(path.read_text()) if path.exists() else None
        if known is None or known["settings"] != json.loads(json.dumps(cell.method.settings())):
            known = run_cell(cell, task, folders, show=True)
        assert known is not None  # nobody asks it to stop
        results[cell.name] = known
        return known

    reference = min(
        (_best_of_grid(FAMILIES[family], run, seeds) for family in REFERENCES), key=_mean_final
    )
    default = [run(FAMILIES[DEFAULT].at(default_exponent(budget)), seed) for seed in range(seeds)]
    exact = _best_of_grid(FAMILIES[FIRST_ORDER], run, 1)[0]
    start, best = exact["start_loss"], min(loss for _, loss in exact["curve"] if loss is not None)
    target, reached = _mean_final(reference), _mean_final(default)
    ratio = budget_ratio([found["curve"] for found in default], target, budget)
    return {
        "budget": budget,
        "seeds": seeds,
        "speedup": {name: ratio["mean"]} if ratio else {},
        "gain_share": {name: share_of_gain(start, reached, best)},
        "reference_gain_share": {name: share_of_gain(start, target, best)},
        "start": {name: start},
        "paper": {name: target},
        "default": {name: reached},
        "first_order": {name: best},
        "curves": {cell: found["curve"] for cell, found in results.items()},
        "provenance": provenance(),
    }


def _best_of_grid(family: Family, run: Run, seeds: int) -> list[dict[str, Any]]:
    """The runs of all seeds at the best rate, which the first seed finds."""
    final: dict[float, float] = {}
    while left := next_exponents(family.exponents, final):
        found = run(family.at(left[0]), 0)
        final[left[0]] = float("inf") if found["final_loss"] is None else found["final_loss"]
    best = best_exponent(final)
    if best is None:
        raise ValueError(f"{family.name} diverged at every rate")
    return [run(family.at(best), seed) for seed in range(seeds)]


def _mean_final(runs: Sequence[dict[str, Any]]) -> float:
    """Infinite where a seed diverged at the rate that is best for the first."""
    finals = [found["final_loss"] for found in runs]
    return math.inf if None in finals else spread(finals)["mean"]
