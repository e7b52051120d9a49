"""One cell: a run by one method on one folder, and how its pictures compare with the base's.

    WORK/cells/FOLDER/METHOD_STEPS_SEED.json     the result
    WORK/cells/FOLDER/METHOD_STEPS_SEED.png      32 score prompts: the base's pictures, the tuned
    WORK/runs/FOLDER/METHOD_STEPS_SEED/          the run as `qzo-diffuse train` leaves it
    WORK/base/                                   pictures of the base, drawn once

A run is the package's own, and so are its figures (`qzo-diffuse evaluate`). The distance to true
drawings is added here."""

import json
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from benchmarks.content.embedded import taught
from benchmarks.content.folders import StyleFolder, style_folder
from benchmarks.content.methods import BEST_STEP, Settings, merged
from benchmarks.content.vgg import SIDE, PictureDistance, fetch
from benchmarks.record import provenance
from qzo_diffusion.config.files import make_config
from qzo_diffusion.diffusion.sampling import grid, load_picture, save_picture
from qzo_diffusion.evaluate import intervals
from qzo_diffusion.runs import training
from qzo_diffusion.runs.style import evaluate, sample
from qzo_diffusion.runs.style.plan import make_plan
from qzo_diffusion.system.files import write_whole
from qzo_diffusion.system.reading import read_json
from qzo_diffusion.train.checkpoint import list_checkpoints

JUDGED_AS = 0  # the seed whose noise held-out images have, whatever seed a run had


@dataclass(frozen=True)
class Cell:
    """A run: `folder/method_steps_seed` names it and its files."""

    folder: str
    method: str
    steps: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.folder}/{self.method}_{self.steps}_{self.seed}"


@dataclass
class Bench:
    """Everything that cells share.

    Args:
        data: the folder of `emoji64.npz` and `meta.json`. work: of results and all else.
        package: the embedded model, see `embedded.unpack`.
        folder_of: makes the folder of a style from its name, `data`, `work` and the concepts that
            the model draws.
        best_step: methods whose best checkpoint by held-out loss counts, not the last.
    """

    data: Path
    work: Path
    package: Path
    folder_of: Callable[[str, Path, Path, Sequence[str]], StyleFolder] = style_folder
    best_step: Collection[str] = BEST_STEP
    _distance: PictureDistance | None = None

    def folder(self, name: str) -> StyleFolder:
        return self.folder_of(name, self.data, self.work, taught(self.package))

    def result(self, cell: Cell) -> Path:
        return self.work / "cells" / f"{cell.name}.json"

    def run(self, cell: Cell) -> Path:
        return self.work / "runs" / cell.name

    @property
    def distance(self) -> PictureDistance:
        if self._distance is None:
            self._distance = PictureDistance.load(fetch(self.work))
        return self._distance


def is_done(bench: Bench, cell: Cell, settings: Mapping[str, Any]) -> bool:
    """Whether there is a result of these very settings."""
    path = bench.result(cell)
    return path.is_file() and bool(read_json(path)["settings"] == settings)


def run_cell(bench: Bench, cell: Cell, settings: Settings, command: str) -> dict[str, Any]:
    """Train, judge, and write the result; returns it.

    Args:
        command: recorded instead of this process's own, which may name folders of one machine.

    Raises:
        UserError: the settings are no valid ones, or the run diverged.
    """
    folder, began = bench.folder(cell.folder), time.perf_counter()
    place = bench.run(cell)
    curve = train(bench, cell, folder, settings)
    run = best_checkpoint(place) if cell.method in bench.best_step else place
    trained_at = time.perf_counter()
    found = evaluated(bench, cell, run)
    drawing = _drawing_distance(bench, folder, run, found["sampling"])
    result = {
        "cell": cell.name,
        "folder": cell.folder,
        "method": cell.method,
        "steps": cell.steps,
        "seed": cell.seed,
        "settings": settings,
        **figures(found),
        "curve": curve,
        "drawing": drawing,
        "seconds": {
            "train": round(trained_at - began, 1),
            "judge": round(time.perf_counter() - trained_at, 1),
        },
        "provenance": provenance() | {"command": command},
    }
    write_whole(bench.result(cell), (json.dumps(result, indent=1) + "\n").encode())
    return result


def on_folder(folder: StyleFolder, cache: Path, seed: int, steps: int) -> Settings:
    """The settings of a run of the embedded model that its method does not choose."""
    return {
        "model": "tiny",
        "data": {
            "style_dir": str(folder.train),
            "validation_dir": str(folder.held_out),
            "cache_dir": str(cache),
        },
        "train": {"seed": seed, "max_steps": steps},
        "compute": {"device": "cpu", "dtype": "float32"},
    }


Curve = list[tuple[int, float]]
"""(step, held-out loss)"""


def train(bench: Bench, cell: Cell, folder: StyleFolder, settings: Settings) -> Curve:
    """Run the cell from its beginning, in `bench.run(cell)`; returns its held-out losses.

    Raises:
        UserError: the settings are no valid ones, or the run diverged.
        KeyboardInterrupt: it was asked to stop; the same command begins the cell anew.
    """
    place = bench.run(cell)
    shutil.rmtree(place, ignore_errors=True)
    own = on_folder(folder, bench.work / "cache", cell.seed, cell.steps)
    place.parent.mkdir(parents=True, exist_ok=True)
    done = training.run(make_plan(make_config(merged(settings, own))), place)
    if done["stopped"]:  # by a signal: a part of a run is no result
        raise KeyboardInterrupt
    _judge_as_seed(place, JUDGED_AS)
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    return [(x["step"], x["validation_loss"]) for x in lines if "validation_loss" in x]


def _judge_as_seed(run: Path, seed: int) -> None:
    """Let the run's held-out images have the noise of this seed, so that seeds can be compared."""
    file = run / "config.yaml"
    settings = yaml.safe_load(file.read_text())
    settings["train"]["seed"] = seed
    file.write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))


def best_checkpoint(run: Path) -> Path:
    """The checkpoint with the lowest held-out loss, or the run itself where it has none."""
    whole, _ = list_checkpoints(run / "checkpoints", check=False)
    scored = [(one.validation_loss, one.folder) for one in whole if one.validation_loss is not None]
    return min(scored)[1] if scored else run


def evaluated(bench: Bench, cell: Cell, run: Path) -> dict[str, Any]:
    """The report's own figures, and its pictures beside the base's."""
    place, known = evaluate.Place.of(run), bench.work / "base" / cell.folder
    base = place.kept.own / "base"
    if known.is_dir():
        shutil.copytree(known, base, dirs_exist_ok=True)  # drawn anew where they do not fit
    found = evaluate.run(evaluate.EvaluateRequest(run))
    if not base.is_dir():  # a checkpoint's pictures of the base lie beside its own
        base = place.kept.part / "base"
    shutil.copytree(base, known, dirs_exist_ok=True)
    columns = [pictures_in(folder) for folder in (base, place.kept.part / "tuned")]
    sheet = bench.result(cell).with_suffix(".png")
    sheet.parent.mkdir(parents=True, exist_ok=True)
    save_picture(side_by_side(*columns), sheet)
    return found


def pictures_in(folder: Path) -> list[Image.Image]:
    """Numbered pictures in their order."""
    return [load_picture(path) for path in sorted(folder.glob("[0-9]*.png"))]


def side_by_side(
    base: Sequence[Image.Image], tuned: Sequence[Image.Image], blocks: int = 4
) -> Image.Image:
    """Pairs of pictures in several blocks of two columns."""
    rows = -(-len(base) // blocks)
    starts = [start for start in range(0, len(base), rows) if start + rows <= len(base)]
    columns = [side[start : start + rows] for start in starts for side in (base, tuned)]
    return grid(columns, ["base", "tuned"] * len(starts))


def figures(found: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of evaluation.json that count here."""
    loss, clip, style, kid = (
        found["validation_loss"],
        found["clip_score"],
        found["style"]["similarity"],
        found["style"]["kid"],
    )
    exact = found["signal"]["base"].get("exact", {})
    return {
        "step": found["step"],
        "loss": {"start": loss["base"], "final": loss["tuned"], "n": loss["n"]},
        "content": before_and_after(clip, clip["base_mean"], clip["mean"]),
        "style": before_and_after(style, style["base_mean"], style["mean"]),
        "kid": before_and_after(kid, kid["base"], kid["value"]),
        "verdict": found["sentence"],
        "signal": {key: exact.get(key) for key in ("cosine", "expected")},
    }


def before_and_after(found: Mapping[str, Any], base: float, tuned: float) -> dict[str, Any]:
    return {"base": base, "tuned": tuned, "delta_ci95": found["delta_ci95"]}


def drawn_by(run: Path) -> Path:
    """The folder whose `samples` are a run's pictures of the held-out concepts."""
    return evaluate.Place.of(run).scores / "drawings"


def _drawing_distance(
    bench: Bench, folder: StyleFolder, run: Path, sampling: Mapping[str, Any]
) -> dict[str, Any]:
    """How much closer the pictures of held-out concepts are to their true drawings than the base's:
    below zero is closer.
    """
    key = f"{folder.name}_drawings_{sampling['steps']}_{sampling['guidance']:g}"
    base, tuned = bench.work / "base" / key, drawn_by(run)
    measured = {}
    for state, place, strength in (("base", base, 0.0), ("tuned", tuned, 1.0)):
        if not (place / "samples").is_dir():
            captions = list(folder.captions)
            sample.run(sample.SampleRequest(place, run=run, strength=strength, prompts=captions))
        measured[state] = bench.distance(pictures_in(place / "samples"), folder.drawings)
    change = intervals.paired(measured["tuned"], measured["base"])
    return {
        "base": change["base_mean"],
        "tuned": float(np.mean(measured["tuned"])),
        "delta": change["delta"],
        "delta_ci95": change["delta_ci95"],
        "concepts": len(folder.concepts),
        "side": SIDE,
    }
