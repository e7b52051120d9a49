"""Base, the default's longest run, first order and the style's own drawing side by side, for
prompts that were held out.

First order is the best that exact gradients of the same scales give. Runs are made again, bit for
bit, from the settings of finished cells, which keep no weights; drawing again takes them from the
checkpoints of the first time."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

from PIL import Image

from benchmarks.convergence.cells import CellRun, finish
from benchmarks.convergence.methods import FAMILIES, FIRST_ORDER, FinalLosses, final_by_exponent
from benchmarks.convergence.results import final_losses, finished
from benchmarks.convergence.settings import DEFAULT, UNSEEN, Cell, Family
from benchmarks.convergence.tasks import STYLE_TASKS, StyleTask, open_style
from qzo_diffusion.diffusion.sampling import grid, save_picture

SHOWN = (f"{DEFAULT}_longest", f"{DEFAULT}_long", DEFAULT)
COUNT = 12


def best_cells(style: str, results: Path) -> dict[str, Cell]:
    """By title: of the default's finished runs over the longest budget, and of first order, those
    that ended lowest.
    """
    final = final_losses(finished(results))
    tuned = next(filter(None, (_lowest(style, FAMILIES[name], final) for name in SHOWN)), None)
    if tuned is None:
        return {}
    exact = _lowest(style, FAMILIES[FIRST_ORDER], final)
    return {"tuned": tuned} if exact is None else {"tuned": tuned, "first order": exact}


def _lowest(style: str, family: Family, final: FinalLosses) -> Cell | None:
    ended = [
        (loss, seed, exponent)
        for seed in range(3)
        for exponent, loss in final_by_exponent(family, style, final, seed).items()
        if math.isfinite(loss)
    ]
    if not ended:
        return None
    _, seed, exponent = min(ended)
    return Cell(style, family.at(exponent, style), seed)


def draw(
    task: StyleTask,
    cells: Mapping[str, Cell],
    checkpoints: Path,
    target: Path,
    stop_requested: Callable[[], bool],
    show: bool = False,
) -> bool:
    """Returns whether it was drawn; asked to stop, the run in hand is checkpointed and the same
    call goes on.
    """
    captions, drawings = task.shown(COUNT)
    sampler = task.sampler(captions)
    columns = {"base": sampler.images()}
    for title, cell in cells.items():
        images = _of_run(
            CellRun(cell, task, checkpoints / f"{cell.name}.safetensors"),
            sampler.images,
            stop_requested,
            show,
        )
        if images is None:
            return False
        columns[title] = images
    columns["the style"] = drawings
    half = COUNT // 2
    halves = [part[start : start + half] for start in (0, half) for part in columns.values()]
    save_picture(grid(halves, [*columns, *columns]), target)
    return True


def _of_run(
    run: CellRun,
    images: Callable[[], list[Image.Image]],
    stop_requested: Callable[[], bool],
    show: bool,
) -> list[Image.Image] | None:
    try:
        if finish(run, stop_requested, show) is None:
            return None
        run.save()
        with run.theta.scales.override(run.theta.perturbed()):
            return images()
    finally:
        run.close()


def draw_all(
    data: Path,
    results: Path,
    cache: Path,
    folder: Path,
    stop_requested: Callable[[], bool],
    say: Callable[[str], None],
) -> bool:
    """One picture for each style, in `folder`, which is made. False when it was asked to stop; the
    same call goes on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for style in STYLE_TASKS:
        cells = {} if style == UNSEEN else best_cells(style, results / "cells")
        if cells:
            target = folder / f"convergence_{style}.png"
            if not draw(
                open_style(style, data, cache),
                cells,
                cache / "pictures",
                target,
                stop_requested,
                show=True,
            ):
                return False
            say(str(target))
    return True
