"""Report on finished cells: the JSON, the table between two markers of docs/convergence.md, and the
plot.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.convergence.figures import Style, figures, geometric_mean
from benchmarks.convergence.methods import BUDGET, FAMILIES, OURS, REFERENCES
from benchmarks.convergence.pictures import sheet
from benchmarks.convergence.results import RECORDED, Results, joined, record, recorded, results_in
from benchmarks.record import RESULTS, provenance, put_between_markers, write_results
from qzo_diffusion.diffusion.sampling import save_picture

ROOT = Path(__file__).parents[2]
DOCUMENT, PLOT = ROOT / "docs/convergence.md", ROOT / "docs/images/convergence.png"
BEGIN, END = (
    "<!-- table: written by `python -m benchmarks.convergence report` -->",
    "<!-- end of table -->",
)
STYLES = ("fluent_mono", "fluent3d", "openmoji")
# SST-2 on SmolLM2, measured before this benchmark ran on the package's own runs
TEXT = RESULTS / "convergence_text.json"
SUMMARY = {
    "start": ("start", ".3f"),
    "reference": ("paper", ".3f"),
    "ours": ("default", ".3f"),
    "exact gradient": ("first_order", ".3f"),
    "times fewer passes": ("speedup", ".1f"),
    "by every row": ("speedup_by_rows", ".1f"),
    "ours, share of the exact gain": ("gain_share", ".0%"),
    "the reference's share": ("reference_gain_share", ".0%"),
}
COLUMNS = (
    *("method", "rate", "seeds", "held-out loss", "share of the exact gain"),
    *("times fewer passes", "style", "content"),
)


def with_text(found: dict[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of the styles with those of SST-2, and the mean over all."""
    whole = dict(found)
    for key, value in text["figures"].items():
        whole[key] = {**whole[key], "sst2": value}
    ratios = whole["speedup"]
    missing = [name for name in STYLES if name not in ratios]
    mean = geometric_mean(list(ratios.values())) if ratios else None
    whole["default_ratio"] = {"geometric_mean": mean, "styles": sorted(ratios), "missing": missing}
    return whole | {"sst2": {"note": text["note"], "provenance": text["provenance"]}}


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _with_range(found: Mapping[str, float] | None, digits: str, absent: str = "") -> str:
    if found is None:
        return absent
    text = f"{found['mean']:{digits}}"
    if found["seeds"] < 2:
        return text
    return f"{text} ({found['low']:{digits}} to {found['high']:{digits}})"


def _change(pictures: Mapping[str, Any] | None, key: str) -> str:
    if pictures is None:
        return ""
    one = pictures[key]
    low, high = one["delta_ci95"]
    return f"{one['tuned'] - one['base']:+.3f} ({low:+.3f} to {high:+.3f})"


def summary(found: Mapping[str, Any]) -> Iterator[str]:
    """A row for each set of data."""
    yield _row(["data", *SUMMARY])
    yield "|---" * (len(SUMMARY) + 1) + "|"
    for data in (*STYLES, "sst2"):
        values = [(found[key].get(data), digits) for key, digits in SUMMARY.values()]
        cells = ["" if value is None else format(value, digits) for value, digits in values]
        yield _row([data, *cells])


def _absent(style: Mapping[str, Any]) -> str:
    """Why a method has no number of passes."""
    if style["reference"] is None or style["exact_loss"] is None:
        return "no reference yet"
    return "not reached" if style["reference_trained"] else "the reference did not train"


def table_of(style: Mapping[str, Any]) -> Iterator[str]:
    """A row for each family of a style."""
    yield _row(COLUMNS)
    yield "|---" * len(COLUMNS) + "|"
    for name, one in style["families"].items():
        reached = "" if FAMILIES[name].exact else _absent(style)
        yield _row(
            [
                name,
                f"{one['lr']:.3g}",
                f"{one['final_loss']['seeds']}",
                _with_range(one["final_loss"], ".4f"),
                _with_range(one["share_of_exact_gain"], ".0%"),
                _with_range(one["times_fewer_passes"], ".1f", reached),
                _change(one["pictures"], "style"),
                _change(one["pictures"], "content"),
            ]
        )


def table(found: Mapping[str, Any], newest: Mapping[str, Any], date: str) -> str:
    """Markdown: the summary, a table for each style, and the methods."""
    ours = found["method_of_default"]
    machine, threads = newest["machine"], newest["threads"]
    lines = [
        f"Written by `python -m benchmarks.convergence report` on {date}; the newest cells by "
        f"`{newest['command']}` on {machine['processor']} ({machine['cores']} cores), "
        f"{newest['date']}, fp32, OMP_NUM_THREADS={threads}.",
        "",
    ]
    ratio = found["default_ratio"]
    missing = ratio["missing"]
    if ratio["geometric_mean"]:
        lines += [
            f"**Ours (`{ours}` on styles, the default on text) needs "
            f"{ratio['geometric_mean']:.1f} times fewer forward passes than the reference, "
            f"geometric mean over {', '.join(ratio['styles'])}"
            + (f"; missing or not reached: {', '.join(missing)}.**" if missing else ".**"),
            "",
        ]
    lines += summary(found)
    for name in STYLES:
        style = found["styles"].get(name, {"families": {}})
        lines += ["", f"### {name}", ""]
        lines += table_of(style) if style["families"] else ["No cell is finished."]
    lines += ["", "### Methods", "", "| method | |", "|---|---|"]
    lines += [_row([name, family.what]) for name, family in FAMILIES.items()]
    return "\n".join(lines)


def plot(results: Results, path: Path) -> None:
    """A panel per style: the held-out loss at the rate compared, mean and range over the seeds, all
    from the first seed's start.
    """
    os.environ.setdefault("MPLBACKEND", "Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5), layout="constrained")
    panels = figure.subplots(1, len(STYLES))
    lines: dict[str, Any] = {}
    for panel, name in zip(panels, STYLES, strict=True):
        style = Style(name, results)
        if style.start is None:
            panel.set_title(f"{name}: no cell is finished")
            panel.set_axis_off()
            continue
        panel.set_title(name)
        for at, (family, runs) in enumerate(style.runs.items()):
            if runs:
                curves = [from_start(run["curve"], style.start) for run in runs]
                lines[family] = _draw(panel, family, at, curves)
        panel.set_xscale("symlog", linthresh=320)
        panel.set_xlim(0, BUDGET)
    figure.supxlabel(
        "passes of one example (exact gradients: forwards and backwards)", fontsize="medium"
    )
    panels[0].set_ylabel("held-out loss")
    if lines:
        at_top = {"loc": "outside upper center", "ncols": len(lines), "fontsize": "small"}
        figure.legend(list(lines.values()), list(lines), **at_top)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def from_start(curve: Sequence[Any], start: float) -> list[tuple[int, float]]:
    """A seed's curve as with the noise of the first seed, whose loss at the start is `start`."""
    return [(passes, loss - curve[0][1] + start) for passes, loss in curve]


def _draw(panel: Any, family: str, at: int, curves: Sequence[Sequence[Any]]) -> Any:
    losses = list(zip(*([loss for _, loss in curve] for curve in curves), strict=False))
    spent = [passes for passes, _ in curves[0]][: len(losses)]
    mean = [math.fsum(values) / len(values) for values in losses]
    kind = "--" if FAMILIES[family].exact else ":" if family in REFERENCES else "-"
    low, high = [min(values) for values in losses], [max(values) for values in losses]
    panel.fill_between(spent, low, high, color=f"C{at}", alpha=0.2)
    width = 2.5 if family == OURS[0] else 1.2
    return panel.plot(spent, mean, kind, color=f"C{at}", linewidth=width)[0]


def write_report(
    work: Path,
    folder: Path = RESULTS,
    document: Path = DOCUMENT,
    picture: Path = PLOT,
    cells: Path = RECORDED,
) -> dict[str, Any]:
    """From the cells in `work` and those that were recorded, which are recorded together."""
    results = joined(recorded(cells), results_in(work))
    record(results, cells)
    found = with_text(figures(results, STYLES), json.loads(TEXT.read_text()))
    write_results("convergence", found, folder)
    now = provenance()
    newest = max(
        (one["provenance"] for one in results.values()), key=lambda one: one["date"], default=now
    )
    content = table(found, newest, now["date"])
    document.write_text(put_between_markers(document.read_text(), content, BEGIN, END))
    plot(results, picture)
    for style in STYLES:
        drawn = sheet(work, style, results)
        if drawn is not None:
            save_picture(drawn, picture.with_name(f"{picture.stem}_{style}.png"))
    return found
