"""The JSON, the table and the plot from whatever is finished."""

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.llm_compare.cells import dtype_of
from benchmarks.llm_compare.methods import METHODS, Places
from benchmarks.record import put_between_markers, write_results

TABLE = ("<!-- table: python -m benchmarks.llm_compare report -->", "<!-- end of table -->")


DRAWN = (
    "default",
    "antithetic",
    "middle_columns",
    "all_layers",
    "paper",
    "mezo",
    "quzo_int8_slow",
    "fo_scales",
    "qlora",
)


def plot(results: list[dict[str, Any]], picture: Path) -> None:
    """Held-out loss of SST-2 against forward passes, a line for every run in `DRAWN`; the
    table has all.
    """
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    panel = figure.subplots()
    colours = {name: matplotlib.colormaps["tab10"](index) for index, name in enumerate(DRAWN)}
    for result in results:
        if result["task"] == "sst2" and result["method"] in DRAWN and result.get("curve"):
            spent, losses = zip(*result["curve"], strict=True)
            line = "--" if METHODS[result["method"]].first_order else "-"
            label = result["method"] if result["seed"] == 0 else None
            panel.plot(
                spent, losses, line, color=colours[result["method"]], label=label, linewidth=1.3
            )
    panel.set_xlabel("forward passes of one example (dashed: forward and backward passes)")
    panel.set_ylabel("held-out loss, SST-2")
    if panel.lines:
        panel.legend(fontsize=8)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)


def report(places: Places, document: Path) -> Path:
    picture = document.parent / "images" / "llm.png"
    found = [
        json.loads(path.read_text())
        for path in sorted((places.results / "cells" / "llm").glob("*/*.json"))
    ]
    peaks = places.results / "llm_memory.json"
    memories: dict[str, Any] = json.loads(peaks.read_text())["methods"] if peaks.exists() else {}
    tasks: dict[str, dict[str, Any]] = {}
    for result in found:
        tasks.setdefault(result["task"], {}).setdefault(result["method"], []).append(result)
    figures = {
        task: {name: _figures(runs, memories.get(name)) for name, runs in of.items()}
        for task, of in tasks.items()
    }
    lines = [
        "| task | method | metric | mean | runs | passes | processor s | held-out loss | "
        "memory over inference |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for task, of in figures.items():
        for name in sorted(of, key=list(METHODS).index):
            one = of[name]
            value = (
                "diverged"
                if one["accuracy"] is None
                else f"{one['accuracy']:.3f} ± {one['accuracy_std']:.3f}"
            )
            loss, peak = _way_down(one), one["memory_over_inference"]
            row = [
                task,
                name if len(one["dtypes"]) == 1 else f"{name}, in {' and '.join(one['dtypes'])}",
                one["metric"],
                value,
                one["runs"],
                one["forwards"],
                one["seconds"],
                loss,
                peak or "-",
            ]
            lines.append("| " + " | ".join(map(str, row)) + " |")
    text = document.read_text(encoding="utf-8")
    document.write_text(
        put_between_markers(text, "\n".join(["", *lines, ""]), *TABLE), encoding="utf-8"
    )
    plot(found, picture)
    shares = {task: share for task, of in figures.items() if (share := _gain_share(of)) is not None}
    return write_results(
        "llm_compare", {"tasks": figures, "gain_share": shares, "memory": memories}, places.results
    )


def _figures(runs: list[dict[str, Any]], memory_of: dict[str, float] | None) -> dict[str, Any]:
    values = [run["value"] for run in runs if run["value"] is not None]
    losses = [run["validation_loss"]["end"] for run in runs if run["validation_loss"]]
    starts = [run["validation_loss"]["start"] for run in runs if run["validation_loss"]]
    curves = [
        [run["validation_loss"]["end"], *(loss for _, loss in run.get("curve", []))]
        for run in runs
        if run["validation_loss"]
    ]
    lowest = [min(curve) for curve in curves]
    return {
        "metric": runs[0]["metric"],
        "accuracy": round(statistics.fmean(values), 4) if values else None,
        "accuracy_std": round(statistics.stdev(values), 4) if len(values) > 1 else 0.0,
        "runs": len(runs),
        "dtypes": sorted(set(map(dtype_of, runs))),
        "ended": sorted({run["ended"] for run in runs}),
        "forwards": max(run["forwards"] for run in runs),
        "seconds": round(statistics.fmean(run["processor_seconds"] for run in runs)),
        "validation_loss": round(statistics.fmean(losses), 4) if losses else None,
        "lowest_validation_loss": round(statistics.fmean(lowest), 4) if lowest else None,
        "validation_loss_at_start": round(statistics.fmean(starts), 4) if starts else None,
        "memory_over_inference": memory_of["memory_over_inference"] if memory_of else None,
    }


def _way_down(one: dict[str, Any]) -> str:
    """Start, end, and the lowest where that is clearly lower."""
    start, end, lowest = (
        one["validation_loss_at_start"],
        one["validation_loss"],
        one["lowest_validation_loss"],
    )
    if end is None:
        return "-"
    return f"{start:.3f} -> {end:.3f}" + (f" (lowest {lowest:.3f})" if lowest < 0.9 * end else "")


def _gain_share(of: dict[str, Any]) -> float | None:
    """Of first order's way down from the same start, to its lowest loss before it overfits, how
    much the default goes.
    """
    ours, exact = of.get("default"), of.get("fo_scales")
    if (
        not ours
        or not exact
        or ours["validation_loss"] is None
        or exact["lowest_validation_loss"] is None
    ):
        return None
    start = ours["validation_loss_at_start"]
    return round((start - ours["validation_loss"]) / (start - exact["lowest_validation_loss"]), 4)
