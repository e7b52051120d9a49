"""Results side by side, and content.json."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.content.folders import SMALL, STYLES
from benchmarks.record import RESULTS, write_results
from qzo_diffusion.system.reading import read_json

Result = Mapping[str, Any]
COLUMNS = (
    *("cell", "loss", "from", "content", "from", "KID", "from", "style", "from"),
    *("drawing", "95 %", "seconds", "verdict"),
)
WORSE = "Worse than"
COSINE_MAY_MISS = 0.2  # of the expected one


def results_in(work: Path) -> list[dict[str, Any]]:
    """All finished cells, by name."""
    return [read_json(path) for path in sorted((work / "cells").glob("*/*.json"))]


def table(results: Iterable[Result]) -> str:
    """A line for each cell; columns of equal width."""
    rows = [COLUMNS, *(_row(one) for one in results)]
    widths = [max(len(row[at]) for row in rows) for at in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _row(one: Result) -> tuple[str, ...]:
    pairs = [(one[key]["tuned"], one[key]["base"]) for key in ("content", "kid", "style")]
    low, high = one["drawing"]["delta_ci95"]
    numbers = [
        one["loss"]["final"],
        one["loss"]["start"],
        *(value for pair in pairs for value in pair),
    ]
    return (
        one["cell"],
        *(f"{value:.3f}" for value in numbers),
        f"{one['drawing']['delta']:+.3f}",
        f"{low:+.3f} to {high:+.3f}",
        f"{sum(one['seconds'].values()):.0f}",
        one["verdict"],
    )


class Seeds:
    """The results of one method on one folder, one for each seed.

    Raises:
        ValueError: there are none.
    """

    def __init__(self, results: Iterable[Result], folder: str, method: str) -> None:
        own = [one for one in results if (one["folder"], one["method"]) == (folder, method)]
        if not own:
            raise ValueError(
                f"no cell {folder}/{method}; expected at least one; run it first: "
                f"--cells '{folder}/{method}_*'"
            )
        steps = {one["steps"] for one in own}
        if len(steps) > 1:
            raise ValueError(
                f"cells {folder}/{method} of {sorted(steps)} steps; expected one number; give "
                "--steps"
            )
        self.own = sorted(own, key=lambda one: one["seed"])

    def values(self, *keys: str) -> list[float]:
        """One value for each seed, `values("content", "tuned")`."""
        found = []
        for one in self.own:
            value: Any = one
            for key in keys:
                value = value[key]
            found.append(float(value))
        return found

    def mean(self, *keys: str) -> float:
        return float(np.mean(self.values(*keys)))

    def lost(self) -> float:
        """Content that the base has and tuned pictures have not, mean over seeds."""
        return self.mean("content", "base") - self.mean("content", "tuned")


def figures(results: Sequence[Result], winner: str, old: str = "default") -> dict[str, Any]:
    """The figures of content.json: means over seeds, with the value of each seed beside them."""
    small = Seeds(results, SMALL, winner)
    keys = {"loss": ("loss", "final"), "content": ("content", "tuned"), "kid": ("kid", "tuned")}
    return {
        "winner": winner,
        "compared_with": old,
        SMALL: {name: small.mean(*path) for name, path in keys.items()}
        | {"seeds": {name: small.values(*path) for name, path in keys.items()}},
        "styles": {name: _of_style(results, name, winner, old) for name in STYLES},
        **_cosine(results, winner),
    }


def _of_style(results: Sequence[Result], name: str, winner: str, old: str) -> dict[str, Any]:
    new, before = Seeds(results, name, winner), Seeds(results, name, old)
    bounds = [one["drawing"]["delta_ci95"] for one in new.own]
    return {
        "content_lost_ratio": new.lost() / before.lost(),
        "loss_ratio": new.mean("loss", "final") / before.mean("loss", "final"),
        "drawing_delta": new.mean("drawing", "delta"),
        # the concepts are the same for every seed, so seeds do not narrow the interval
        "drawing_delta_ci95": [float(value) for value in np.mean(bounds, axis=0)],
        "worse_than_base": sum(one["verdict"].startswith(WORSE) for one in new.own),
        "seeds": {
            "content": new.values("content", "tuned"),
            "content_of_base": new.values("content", "base"),
            "loss": new.values("loss", "final"),
            "drawing_delta": new.values("drawing", "delta"),
            "content_before": before.values("content", "tuned"),
            "loss_before": before.values("loss", "final"),
        },
    }


def _cosine(results: Sequence[Result], winner: str) -> dict[str, Any]:
    """Whether estimates agree with the exact gradient as far as theory says they can."""
    own = [one["signal"] for one in results if one["method"] == winner]
    known = [one for one in own if one["cosine"] is not None and one["expected"] is not None]
    measured, expected = (
        float(np.mean([one[key] for one in known])) if known else None
        for key in ("cosine", "expected")
    )
    near = measured is not None and abs(measured / expected - 1) <= COSINE_MAY_MISS  # type: ignore[operator]
    return {"expected_cosine_ok": near, "cosine": {"measured": measured, "expected": expected}}


def write_report(
    work: Path, winner: str, steps: int, old: str = "default", folder: Path = RESULTS
) -> Path:
    """Write content.json from the cells of this many steps."""
    results = [one for one in results_in(work) if one["steps"] == steps]
    return write_results("content", figures(results, winner, old), folder)
