"""The losses of all methods on any folder of captioned images; pictures are not judged."""

import shutil
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
from qzo_diffusion.config.files import make_config
from qzo_diffusion.runs.style.plan import make_plan


def families_of(steps: int, seeds: int) -> Families:
    """Those of the table, forward passes over another number of steps and of seeds."""
    return {
        name: one if one.exact else replace(one, steps=steps, seeds=seeds)
        for name, one in FAMILIES.items()
    }


def split(style_dir: Path, work: Path) -> tuple[Path, Path]:
    """Copies of the images to train on and of those that a run of seed 0 holds out, with their
    captions, so that every seed has the same ones.

    Raises:
        ValueError: there are too few to hold out some.
    """
    settings = {"model": "tiny", "data": {"style_dir": str(style_dir)}}
    style = make_plan(make_config(settings | {"compute": {"device": "cpu"}})).style
    if not style.validation:
        raise ValueError(
            f"{style_dir} is too small; a run holds out some of 20 different images or more"
        )
    places = work / "train", work / "held_out"
    for place, samples in zip(places, (style.train, style.validation), strict=True):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        for at, sample in enumerate(samples):
            shutil.copyfile(sample.path, place / f"{at:04d}{sample.path.suffix}")
            (place / f"{at:04d}.txt").write_text(sample.caption, "utf-8")
    return places


def bench_of(style_dir: Path, work: Path) -> Bench:
    train, held_out = split(style_dir, work)

    def folder_of(name: str, _data: Path, _work: Path, _taught: Sequence[str]) -> StyleFolder:
        return StyleFolder(name, train, held_out, [], [], [])

    return Bench(style_dir, work.resolve(), resources.PACKAGE, folder_of)


def compare(style_dir: Path, budget: int, seeds: int, work: Path) -> dict[str, Any]:
    """The figures, with the keys of convergence.json; `work` keeps finished cells, so that the same
    call goes on.

    Args:
        budget: forward passes of a run; exact gradients have the table's steps. seeds: of the
            reference and of ours.

    Raises:
        ValueError: too few images, or `work` is of others.
    """
    name, families = style_dir.resolve().name, families_of(budget // PASSES_OF_STEP, seeds)
    command = "python -m benchmarks.convergence --style-dir FOLDER"
    results = run_open(bench_of(style_dir, work), name, {}, command, families)
    own = {"budget": budget, "seeds": seeds, "provenance": provenance()}
    return figures(results, [name], families) | own
