"""pictures.json and the sheets of docs/pictures.md, from finished cells."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.content.cells import Bench, Cell, drawn_by, pictures_in
from benchmarks.content.table import Result
from benchmarks.pictures.methods import EXACT, SHOWN
from benchmarks.record import RESULTS, write_results
from qzo_diffusion.diffusion.sampling import grid, save_picture

THINGS = 16  # of a sheet, evenly from the list
BLOCKS = 2  # of columns, side by side
TITLES = ("base", "tuned", "exact gradient", "true drawing")


def the_run(results: Sequence[Result], style: str, steps: int) -> Result:
    """By the demo's settings. Raises: ValueError: it was not run."""
    for one in results:
        if (one["folder"], one["method"], one["steps"]) == (style, SHOWN, steps):
            return one
    raise ValueError(f"no cell {style}/{SHOWN}_{steps}_*; expected one; run it first")


def the_exact(results: Sequence[Result], style: str) -> Result | None:
    """The rate whose best checkpoint has the lowest held-out loss; None where none was run."""
    own = [one for one in results if one["folder"] == style and one["method"] in EXACT]
    return min(own, key=lambda one: float(one["loss"]["final"]), default=None)


def change(one: Result, key: str) -> float:
    """Of `content` or `style`, tuned less base."""
    return float(one[key]["tuned"]) - float(one[key]["base"])


def figures_of(tuned: Result, exact: Result | None) -> dict[str, Any]:
    """The figures of one style.

    share: the style that the run gains over the exact gradient's gain. per_content: style
    gained for each unit of content lost, over the exact gradient's; None where one loses none.
    """
    found: dict[str, Any] = {
        "loss": [tuned["loss"]["start"], tuned["loss"]["final"]],
        "step": tuned["step"],
    }
    for key in ("style", "content"):
        found[f"{key}_delta"] = change(tuned, key)
        found[f"{key}_delta_ci95"] = tuned[key]["delta_ci95"]
    found |= {f"drawing_{key}": tuned["drawing"][key] for key in ("delta", "delta_ci95")}
    if exact is None:
        return found
    style, content = change(exact, "style"), change(exact, "content")
    losses = min(-change(tuned, "content"), -content)
    return found | {
        "first_order_method": exact["method"],
        "first_order_step": exact["step"],
        "first_order_loss": exact["loss"]["final"],
        "first_order_style_delta": style,
        "first_order_content_delta": content,
        "first_order_drawing_delta": exact["drawing"]["delta"],
        "share": found["style_delta"] / style,
        "per_content": found["style_delta"] / style * content / found["content_delta"]
        if losses > 0
        else None,
    }


def figures(
    results: Sequence[Result], shown: Sequence[str], others: Sequence[str], steps: int
) -> dict[str, Any]:
    """The figures of pictures.json without the demo's seconds.

    shown: the demo's style first, then two others."""
    found = {
        name: figures_of(the_run(results, name, steps), the_exact(results, name))
        for name in (*shown, *others)
    }
    return {
        "demo": shown[0],
        "styles": {name: found[name] for name in shown},
        "candidates": {name: found[name] for name in others},
    }


def write_report(
    results: Sequence[Result],
    shown: Sequence[str],
    others: Sequence[str],
    steps: int,
    demo_seconds: float | None,
    folder: Path = RESULTS,
) -> Path:
    whole = figures(results, shown, others, steps) | {"demo_seconds": demo_seconds}
    return write_results("pictures", whole, folder)


def sheet(bench: Bench, results: Sequence[Result], style: str, steps: int) -> Image.Image:
    """Held-out concepts as base, run and exact gradient draw them, beside the true drawings.

    Raises:
        ValueError: it was not run.
    """
    (base,) = (bench.work / "base").glob(f"{style}_drawings_*")
    runs = [the_run(results, style, steps), the_exact(results, style)]
    cells = [Cell(style, one["method"], one["steps"], one["seed"]) for one in runs if one]
    places = [base, *(drawn_by(bench.run(cell)) for cell in cells)]
    columns = [pictures_in(place / "samples") for place in places]
    columns.append(list(bench.folder(style).drawings))
    titles = [TITLES[0], *TITLES[1 : len(places)], TITLES[-1]]
    shown = [[column[at * len(column) // THINGS] for at in range(THINGS)] for column in columns]
    starts = range(0, THINGS, THINGS // BLOCKS)
    blocks = [one[start : start + THINGS // BLOCKS] for start in starts for one in shown]
    return grid(blocks, titles * BLOCKS)


def write_sheets(
    bench: Bench, results: Sequence[Result], styles: Sequence[str], steps: int, folder: Path
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for style in styles:
        save_picture(sheet(bench, results, style, steps), folder / f"pictures_{style}.png")
