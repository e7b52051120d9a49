"""Pictures of the first seed of each method side by side, at equal prompts and seeds."""

from pathlib import Path

from PIL import Image

from benchmarks.content.cells import best_checkpoint, pictures_in
from benchmarks.convergence.figures import Style
from benchmarks.convergence.methods import FAMILIES
from benchmarks.convergence.results import Results
from qzo_diffusion.diffusion.sampling import grid
from qzo_diffusion.runs.style.evaluate import Place

TITLES = {
    "default": "every row",
    "subspace": "subspace",
    "first_order": "exact, rows",
    "first_order_dense": "exact, all",
    "qlora": "QLoRA",
}
SHOWN = 8  # prompts, evenly from the list


def sheet(work: Path, style: str, results: Results) -> Image.Image | None:
    """The base's pictures and those of each method; None where a method's are not in `work`."""
    columns = [pictures_in(work / "base" / style)]
    known = Style(style, results)
    if known.reference is None:
        return None
    titles = {known.reference: "reference", **TITLES}
    for family in titles:
        runs = [run for run in known.runs[family] if run["seed"] == 0 and run["pictures"]]
        folder = _folder(work / "runs" / runs[0]["cell"], family) if runs else None
        if folder is None or not folder.is_dir():
            return None
        columns.append(pictures_in(folder))
    places = [at * len(columns[0]) // SHOWN for at in range(SHOWN)]
    shown = [[column[at] for at in places] for column in columns]
    return grid(shown, ["base", *titles.values()])


def _folder(run: Path, family: str) -> Path | None:
    """The scored pictures of a run, of exact gradients those of the best step."""
    if family == "qlora":
        return run / "tuned"
    if not run.is_dir():
        return None
    judged = best_checkpoint(run) if FAMILIES[family].exact else run
    return Place.of(judged).kept.part / "tuned"
