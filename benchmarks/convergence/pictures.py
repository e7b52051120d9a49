"""What the default's best run on each style looks like: base, tuned and the style's own drawing, for prompts that were held out.

The run is made again, bit for bit, from the settings of its finished cell; a cell keeps no weights.
"""

from pathlib import Path

from benchmarks.convergence.cells import CellRun, finished
from benchmarks.convergence.methods import DEFAULT, FAMILIES, UNSEEN, Cell
from benchmarks.convergence.tasks import STYLE_TASKS, StyleTask, open_style
from qzo_diffusion.diffusion.sampling import grid, save_picture

SHOWN = (f"{DEFAULT}_long", DEFAULT)
COUNT = 12


def best_cell(style: str, results: Path) -> Cell | None:
    """Of the default's finished runs over the longest budget, the one that ended lowest."""
    known = finished(results)
    for name in SHOWN:
        family = FAMILIES[name]
        method = family.at(family.exponents[0])
        ended = {seed: known.get(f"{style}/{method.name}_{seed}") for seed in range(3)}
        losses = {seed: result["final_loss"] for seed, result in ended.items() if result and result["final_loss"] is not None}
        if losses:
            return Cell(style, method, min(losses, key=lambda seed: losses[seed]))
    return None


def draw(task: StyleTask, cell: Cell, checkpoint: Path, target: Path) -> None:
    captions, drawings = task.shown(COUNT)
    sampler = task.sampler(captions)
    base = sampler.images()
    run = CellRun(cell, task, checkpoint)
    try:
        run.advance(cell.method.steps, lambda: False)
        with task.scales.showing(run.numbers.view()):
            tuned = sampler.images()
    finally:
        run.close()
    half = COUNT // 2
    columns = [part[start : start + half] for start in (0, half) for part in (base, tuned, drawings)]
    save_picture(grid(columns, ["base", "tuned", "the style", "base", "tuned", "the style"]), target)


def draw_all(data: Path, results: Path, cache: Path, folder: Path) -> list[Path]:
    made = []
    for style in STYLE_TASKS:
        cell = None if style == UNSEEN else best_cell(style, results / "cells")
        if cell is not None:
            target = folder / f"convergence_{style}.png"
            draw(open_style(style, data, cache), cell, cache / "pictures" / f"{cell.name}.safetensors", target)
            made.append(target)
    return made
