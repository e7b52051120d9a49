"""One cell: a run by one method at one rate on one style, and the loss of its held-out drawings.

    WORK/cells/STYLE/METHOD_STEPS_SEED.json     the result
    WORK/runs/STYLE/METHOD_STEPS_SEED/          the run as `qzo-diffuse train` leaves it

Runs are the package's own. Adapters, which the package has for language models alone, are in
`adapters`."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.content import cells as content
from benchmarks.content.cells import Bench, Cell, Curve, merged, on_folder
from benchmarks.content.folders import StyleFolder
from benchmarks.content.methods import Settings
from benchmarks.convergence import adapters
from benchmarks.convergence.methods import FAMILIES, Families, Family, open_cells, settled
from benchmarks.convergence.results import (
    Result,
    Results,
    final_losses,
    joined,
    loss_of,
    results_in,
)
from benchmarks.record import provenance
from qzo_diffusion import resources
from qzo_diffusion.core.errors import TrainingDiverged
from qzo_diffusion.system.files import write_whole


def run_cell(bench: Bench, family: Family, cell: Cell, settings: Settings, command: str) -> Result:
    """Train, and write the result; returns it. Pictures are judged by `judge`.

    Args:
        command: recorded instead of this process's own, which may name folders of one machine.
    """
    began, pictures = time.perf_counter(), None
    folder = bench.folder(cell.folder)
    try:
        if "adapters" in settings:
            own = on_folder(folder, bench.work / "cache", cell.seed, cell.steps)
            found = adapters.train(merged(settings, own), bench.run(cell))
            curve, pictures = found.curve, found.pictures
        else:
            curve = content.train(bench, cell, folder, settings)
    except TrainingDiverged:
        curve = Curve()
    result: Result = {
        "cell": cell.name,
        "family": family.name,
        "lr": settings["train"]["lr"],
        "seed": cell.seed,
        "settings": settings,
        "inputs": inputs_of(folder),
        "curve": [(family.passes(step), loss) for step, loss in curve],
        "pictures": pictures,
        "seconds": round(time.perf_counter() - began, 1),
        "provenance": provenance() | {"command": command},
    }
    write(bench, cell, result)
    return result


def inputs_of(folder: StyleFolder) -> str:
    """A hash of the images with their captions, and of the embedded model's weights."""
    places = [folder.train, folder.held_out, resources.tiny_model() / "transformer"]
    files = [file for place in places for file in sorted(place.iterdir())]
    found = hashlib.sha256()
    for file in files:
        found.update(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return found.hexdigest()[:16]


def judge(bench: Bench, family: Family, cell: Cell, result: Result) -> Result:
    """Add how the pictures changed from the base's; of exact gradients, those of the best step."""
    place = bench.run(cell)
    run = content.best_checkpoint(place) if family.exact else place
    figures = content.figures(content.evaluated(bench, cell, run))
    found = result | {"pictures": {key: figures[key] for key in ("content", "style")}}
    write(bench, cell, found)
    return found


def write(bench: Bench, cell: Cell, result: Mapping[str, Any]) -> None:
    path = bench.result(cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(result, indent=1) + "\n").encode())


def run_open(
    bench: Bench,
    style: str,
    known: Results,
    command: str,
    families: Families = FAMILIES,
    wanted: Callable[[str], bool] = lambda name: True,
) -> Results:
    """Run what is open, and what follows from it; returns all results of the style.

    Args:
        known: results of cells that need not be run. wanted: of a cell's name, whether to run it.

    Raises:
        ValueError: the work folder holds cells of other images.
    """
    inputs = inputs_of(bench.folder(style))
    found = results_in(bench.work, families)
    for name, one in found.items():
        if name.startswith(f"{style}/") and one["inputs"] != inputs:
            raise ValueError(f"{name} has other images or weights; give another work folder")
    here = {name: one for name, one in known.items() if one["inputs"] == inputs}
    results = joined(here, found)
    while True:
        final = final_losses(results, families)
        cells = [one for one in open_cells(style, final, families) if wanted(one[1].name)]
        if not cells:
            return results
        family, cell, settings = cells[0]
        results[cell.name] = run_cell(bench, family, cell, settings, command)
        print(f"{cell.name}: {loss_of(family, results[cell.name]):.4f}", flush=True)


def judge_open(bench: Bench, style: str, results: Results, wanted: Callable[[str], bool]) -> None:
    """Judge the pictures of the first seed of each family whose rate is known."""
    final = final_losses(results, FAMILIES)
    for family in FAMILIES.values():
        known, exponent = settled(family, style, final)
        cell = family.cell(style, exponent, 0)
        one = results.get(cell.name) if known else None
        if one is None or one["pictures"] is not None or not wanted(cell.name):
            continue
        if math.isfinite(final[cell.name]) and bench.run(cell).is_dir():
            print(f"{cell.name}: {judge(bench, family, cell, one)['pictures']}", flush=True)
