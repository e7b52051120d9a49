"""Report on finished cells: the JSON, the table between two markers of docs/convergence.md, and the
plot.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.convergence.figures import Results, Style, curve_of, figures
from benchmarks.convergence.methods import FAMILIES, REFERENCES
from benchmarks.convergence.results import finished
from benchmarks.convergence.settings import DATA, DEFAULT, UNSEEN
from benchmarks.record import provenance, put_between_markers, write_results

ROOT = Path(__file__).parents[2]
DOCUMENT, PLOT = ROOT / "docs/convergence.md", ROOT / "docs/images/convergence.png"
BEGIN, END = (
    "<!-- table: written by `python -m benchmarks.convergence report` -->",
    "<!-- end of table -->",
)


def _with_range(found: Mapping[str, float] | None, digits: str, absent: str = "missing") -> str:
    if found is None:
        return absent
    text = f"{found['mean']:{digits}}"
    return (
        text
        if found["seeds"] < 2
        else f"{text} ({found['low']:{digits}} to {found['high']:{digits}})"
    )


def _ratio_in_words(style: Style, name: str) -> str:
    if FAMILIES[name].template.first_order:
        return ""
    if style.reference is None:
        return "no reference yet"
    if style.trained() is False:
        return "reference did not train"
    return _with_range(style.ratio(name), ".1f", "not reached")


def table(results: Results, figures_: Mapping[str, Any], recorded: Mapping[str, Any]) -> str:
    """Markdown: one table for each set of data, then what is missing."""
    machine = recorded["machine"]
    lines = [
        f"Written by `python -m benchmarks.convergence report` on {recorded['date']}; cells by "
        f"`python -m benchmarks.convergence run --data FOLDER` on {machine['processor']} "
        f"({machine['cores']} cores), "
        f"styles in fp32 and sst2 in bf16, OMP_NUM_THREADS={recorded['threads']}.",
        "",
    ]
    default = figures_["default_ratio"]
    mean, covered = default["geometric_mean"], default["styles"]
    lines.append(
        f"**The default, `{DEFAULT}`, against the reference: "
        + (
            f"{mean:.1f} times fewer forward passes, geometric mean over {', '.join(covered)}"
            if mean
            else "not measured yet"
        )
        + (
            f"; missing or not reached: {', '.join(default['missing'])}.**"
            if default["missing"]
            else ".**"
        )
    )
    if default["provisional_because"]:
        lines += ["", f"This is provisional: {'; '.join(default['provisional_because'])}."]
    lines += ["", *_summary(figures_)]
    for data in DATA:
        style = Style(data, results)
        lines += ["", f"### {data}", ""]
        if style.start is None:
            lines.append("No cell is finished.")
            continue
        reference = (
            f"{style.reference}, {style.target:.4f}" if style.target is not None else "missing"
        )
        best = f"{style.best:.4f}" if style.best is not None else "missing"
        lines += [
            f"Start {style.start:.4f}; first order on dense scales {best}; reference: {reference}"
            + (
                "."
                if style.trained() is not None
                else ", whether it trained is not known before first order is."
            ),
            "",
            "| method | rate | seeds | held-out loss at the end | share of the first-order "
            "gain | times fewer passes | CPU s |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, found in figures_["styles"][data]["families"].items():
            lines.append(
                f"| {name} | {found['lr']:.3g} | {found['final_loss']['seeds']} | "
                f"{_with_range(found['final_loss'], '.4f')} "
                f"| {_with_range(style.share(name), '.1%')} | {_ratio_in_words(style, name)} "
                f"| {found['processor_seconds']:.0f} |"
            )
    lines += ["", "### Missing", ""]
    lines += [f"* {sentence}" for sentence in figures_["missing"]] or ["Nothing."]
    return "\n".join(lines)


def _summary(figures_: Mapping[str, Any]) -> list[str]:
    """One row for each set of data: what the default is called to account for."""
    columns = {
        "start": ("start", ".3f"),
        "reference": ("paper", ".3f"),
        "default": ("default", ".3f"),
        "first order": ("first_order", ".3f"),
        "times fewer passes": ("speedup", ".1f"),
        "share of first order, 64,000 passes": ("gain_share", ".0%"),
        "the reference's share": ("reference_gain_share", ".0%"),
        "gain over the tuned default's": ("default_gain_over_tuned", ".2f"),
    }
    rows = ["| data | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for data in (*DATA, UNSEEN):
        values = [
            format(figures_[key][data], digits) if data in figures_[key] else ""
            for key, digits in columns.values()
        ]
        rows.append(f"| {data} | " + " | ".join(values) + " |")
    return rows


def methods_table() -> str:
    rows = [
        f"| {name} | {family.what} | {family.template.budget:,} |"
        for name, family in FAMILIES.items()
    ]
    return "\n".join(["| method | what | budget |", "|---|---|---|", *rows])


NAMED = ("default", "antithetic", "paper_relative", "paper_absolute", "first_order_dense", "qlora")
"""Families with a colour of their own; that of a longer budget shares it, and all others are
grey.
"""
OTHERS = "others of the tables"


def plot(results: Results, path: Path) -> None:
    """A panel per style: the held-out loss at the best rate of each family, mean and range over the
    seeds.
    """
    os.environ.setdefault("MPLBACKEND", "Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5), layout="constrained")
    panels = figure.subplots(1, len(DATA))
    named: dict[str, Any] = {}
    for panel, data in zip(panels, DATA, strict=True):
        style = Style(data, results)
        panel.set_title(data if style.start is not None else f"{data}: no cell is finished")
        for name, runs in style.runs.items():
            if runs:
                label = (
                    name.removesuffix("_long") if name.removesuffix("_long") in NAMED else OTHERS
                )
                drawn = _draw(panel, name, label, runs)
                named[label] = drawn if name == label else named.get(label, drawn)
        if style.target is not None:
            panel.axhline(style.target, color="grey", linewidth=0.7)
        if style.start is None:
            panel.set_axis_off()
            continue
        panel.set_xscale("symlog", linthresh=320)
        panel.set_xlim(left=0)
    figure.supxlabel(
        "forward passes of one example (first order and QLoRA: forward and backward passes)",
        fontsize="medium",
    )
    order = [label for label in (*NAMED, OTHERS) if label in named]
    figure.legend(
        [named[label] for label in order],
        order,
        loc="outside upper center",
        ncols=len(order) or 1,
        fontsize="small",
    )
    panels[0].set_ylabel("held-out loss")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _draw(panel: Any, name: str, label: str, runs: Sequence[Mapping[str, Any]]) -> Any:
    losses = list(zip(*([loss for _, loss in curve_of(run)] for run in runs), strict=False))
    spent = [x for x, _ in curve_of(runs[0])][: len(losses)]
    mean = [math.fsum(values) / len(values) for values in losses]
    if label not in NAMED:
        return panel.plot(spent, mean, color="darkgrey", linewidth=0.6, zorder=1)[0]
    line = "--" if FAMILIES[name].template.first_order else ":" if label in REFERENCES else "-"
    width, colour = 2.5 if name == DEFAULT else 1.2, f"C{NAMED.index(label)}"
    panel.fill_between(
        spent, [min(v) for v in losses], [max(v) for v in losses], color=colour, alpha=0.2
    )
    return panel.plot(spent, mean, line, color=colour, linewidth=width)[0]


def write_report(
    results_folder: Path, document: Path = DOCUMENT, picture: Path = PLOT
) -> dict[str, Any]:
    results = finished(results_folder / "cells")
    found = figures(results)
    recorded = provenance()
    if results:  # the table names where the cells ran, not where they were put together
        last = list(results.values())[-1]["provenance"]
        recorded |= {key: last[key] for key in ("machine", "threads")}
    write_results("convergence", found, results_folder)
    content = table(results, found, recorded) + "\n\n### Methods\n\n" + methods_table()
    document.write_text(put_between_markers(document.read_text(), content, BEGIN, END))
    plot(results, picture)
    return found
