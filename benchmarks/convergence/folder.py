"""The same comparison on any folder of captioned images: the paper's step over a grid of rates
against the default, by itself.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.content.cells import Bench
from benchmarks.content.folders import StyleFolder
from benchmarks.convergence.cells import run_open
from benchmarks.convergence.figures import figures
from benchmarks.convergence.methods import FAMILIES, PASSES_OF_STEP, Families
from benchmarks.record import provenance
from qzo_diffusion import resources


def families_of(steps: int, seeds: int) -> Families:
    """Those of the table, forward passes over another number of steps and of seeds."""
    return {
        name: one if one.exact else replace(one, steps=steps, seeds=seeds)
        for name, one in FAMILIES.items()
    }


def bench_of(style_dir: Path, work: Path) -> Bench:
    """A folder alone; a run holds out some of its images."""

    def folder_of(name: str, data: Path, _work: Path, _taught: Sequence[str]) -> StyleFolder:
        return StyleFolder(name, data, None, [], [], [])

    return Bench(style_dir, work.resolve(), resources.PACKAGE, folder_of)


def compare(style_dir: Path, budget: int, seeds: int, work: Path) -> dict[str, Any]:
    """The figures, with the keys of convergence.json; `work` keeps finished cells, so that the same
    call goes on.

    Args:
        budget: forward passes of a run. seeds: of the reference and of ours.
    """
    name, families = style_dir.resolve().name, families_of(budget // PASSES_OF_STEP, seeds)
    command = "python -m benchmarks.convergence --style-dir FOLDER"
    results = run_open(bench_of(style_dir, work), name, {}, command, families)
    own = {"budget": budget, "seeds": seeds, "provenance": provenance()}
    return figures(results, [name], families) | own
