"""The tables of docs/comparison.md, from the results of several benchmarks."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import put_between_markers, update_results

NAME = "comparison"
END = "<!-- end of table -->"
MARKERS = {
    "sst2": ("<!-- sst2: python -m benchmarks.comparison report -->", END),
    "states": ("<!-- states: python -m benchmarks.comparison report -->", "<!-- end of states -->"),
    "rotations": (
        "<!-- rotations: python -m benchmarks.comparison report -->",
        "<!-- end of rotations -->",
    ),
}
# method -> trained, and the cell of llm_compare or quzo that it is
ELSEWHERE = {
    "qzo": ("scales of NF4: factors of rows and columns", "default"),
    "quzo": ("codes of int8: factors of rows and columns", "quzo_default"),
    "mezo": ("weights", "mezo"),
    "qlora": ("adapters beside NF4", "qlora"),
    "fo_scales": ("scales of NF4, exact gradient", "fo_scales"),
}
HEADER = [
    "method",
    "trained",
    "accuracy on 872",
    "memory of a step over inference",
    "passes of an example",
    "held-out loss",
    "runs",
    "processor min",
]
RIVALS = {
    "lsq": "weights and step sizes of int4",
    "grass": "64 rows of each weight",
    "wta_crs": "weights, gradient from 0.3 of the tokens",
    "adamw": "weights",
}


def sst2(results: Path) -> dict[str, dict[str, Any]]:
    """method -> figures, of every method whose results are there."""
    found: dict[str, dict[str, Any]] = {}
    for name, (_, cell) in ELSEWHERE.items():
        runs = _runs(results / "cells" / "llm" / "sst2", cell)
        if runs:
            found[name] = _figures(runs, _memory(results, cell))
    for name in RIVALS:
        runs = _runs(results / "cells" / "rivals" / "sst2", name)
        if runs:
            found[name] = _figures(runs, _memory(results, name))
    return found


def _runs(folder: Path, cell: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"{cell}_[0-9].json"))]


def _memory(results: Path, cell: str) -> float | None:
    """A step over inference; LSQ's over inference of NF4, since it trains a model of 4 bits."""
    known: dict[str, Any] = dict(_read(results / "quzo_measured.json").get("memory", {}))
    for name in ("llm_memory", "rivals_memory"):
        known |= _read(results / f"{name}.json").get("methods", {})
    if cell == "lsq" and cell in known:
        of_four_bits: float = known["fo_scales"]["inference_mb"]
        return round(known[cell]["step_mb"] / of_four_bits, 4)
    figure: float | None = known.get(cell, {}).get("memory_over_inference")
    return figure


def _figures(runs: Sequence[Mapping[str, Any]], memory: float | None) -> dict[str, Any]:
    losses = [run["validation_loss"]["end"] for run in runs]
    return {
        "accuracy": round(sum(run["value"] for run in runs) / len(runs), 4),
        "memory_over_inference": memory,
        "runs": len(runs),
        "passes": max(run["forwards"] for run in runs),
        "validation_loss": round(sum(losses) / len(losses), 4),
        "processor_minutes": round(sum(run["processor_seconds"] for run in runs) / len(runs) / 60),
    }


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    """part -> its table, of the parts that are there."""
    made = {}
    if "sst2" in figures:
        made["sst2"] = _table(
            HEADER,
            [_row(name, one) for name, one in figures["sst2"].items()],
        )
    if "states" in figures:
        made["states"] = _table(
            ["bits", "held-out loss", "share of the gain of 32 bits", "memory of the state"],
            [
                [
                    bits,
                    f"{one['validation_loss_at_start']:.3f} -> {one['validation_loss']:.3f}",
                    f"{one['gain_share']:.3f}",
                    f"{one['memory_ratio']:.3f}",
                ]
                for bits, one in figures["states"].items()
            ],
        )
    if "rotations" in figures:
        made["rotations"] = _table(
            ["`quant.transform`", "W4A16", "W4A4", "SST-2 held-out loss", "accuracy"],
            [_rotation(name, one) for name, one in figures["rotations"].items()],
        )
    return made


def _rotation(name: str, one: Mapping[str, Any]) -> list[str]:
    """Perplexities of a transform, and a run's figures at its start and end; - where none are."""
    ran = one.get("sst2", {})
    of_text = [f"{one[width]:,.1f}" if width in one else "-" for width in ("w4a16", "w4a4")]
    of_run = [
        f"{ran[key]['start']:.3f} -> {ran[key]['end']:.3f}" if ran else "-"
        for key in ("validation_loss", "accuracy")
    ]
    return [f"`{name}`", *of_text, *of_run]


def _row(name: str, one: Mapping[str, Any]) -> list[str]:
    memory = one["memory_over_inference"]
    return [
        f"`{name}`",
        RIVALS[name] if name in RIVALS else ELSEWHERE[name][0],
        f"{one['accuracy']:.3f}",
        "-" if memory is None else f"{memory:.2f}",
        f"{one['passes']:,}",
        f"{one['validation_loss']:.3f}",
        str(one["runs"]),
        str(one["processor_minutes"]),
    ]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(["", *("| " + " | ".join(line) + " |" for line in lines), ""])


def report(results: Path, document: Path) -> Path:
    """Write `sst2` into comparison.json, and all tables of it into the document."""
    path = update_results(NAME, "sst2", {"sst2": sst2(results)}, {}, results)
    text = document.read_text(encoding="utf-8")
    for part, table in tables(_read(path)).items():
        text = put_between_markers(text, table, *MARKERS[part])
    document.write_text(text, encoding="utf-8")
    return path


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found
