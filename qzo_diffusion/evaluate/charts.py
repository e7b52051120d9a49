"""Compute curves with intervals as geometry for inline SVG. The page brings the colours, so one
drawing serves light and dark.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

WIDTH, HEIGHT = 640, 280
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 14, 40
BINS = 60
LARGEST = 1e30  # beyond it everything else would look like a straight line


@dataclass(frozen=True)
class Point:
    """One value, and its interval if there is one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """A curve; `marks` draws its points too, for values that were measured at a few steps only."""

    label: str
    points: Sequence[Point]
    marks: bool = False


def binned(steps: Sequence[int], values: Sequence[float], bins: int = BINS) -> list[Point]:
    """Return means of neighbouring steps with 95 % intervals of the mean (normal): single steps are
    too noisy to read.
    """
    points = []
    for part in np.array_split(np.arange(len(steps)), min(bins, len(steps))):
        chosen = np.asarray(values, np.float64)[part]
        half = 1.96 * chosen.std(ddof=1) / np.sqrt(len(chosen)) if len(chosen) > 1 else 0.0
        mean = float(chosen.mean())
        points.append(
            Point(float(np.mean([steps[index] for index in part])), mean, mean - half, mean + half)
        )
    return points


def chart(
    title: str, series: Sequence[Series], y_label: str, x_label: str = "step"
) -> dict[str, Any] | None:
    """Return everything that the page needs to draw the curves, None if no curve has a point."""
    drawable = [replace(one, points=[p for p in one.points if _is_drawable(p)]) for one in series]
    shown = [one for one in drawable if one.points]
    if not shown:
        return None
    x_range = _range([point.x for one in shown for point in one.points], margin=0.0)
    y_range = _range([value for one in shown for value in _extent(one.points)], margin=0.06)

    def x(value: float) -> float:
        return round(
            LEFT + (value - x_range[0]) / (x_range[1] - x_range[0]) * (WIDTH - LEFT - RIGHT), 2
        )

    def y(value: float) -> float:
        return round(
            HEIGHT
            - BOTTOM
            - (value - y_range[0]) / (y_range[1] - y_range[0]) * (HEIGHT - TOP - BOTTOM),
            2,
        )

    curves = []
    for one in shown:
        banded = [point for point in one.points if point.low is not None and point.high is not None]
        edge = [(point.x, point.high) for point in banded] + [
            (point.x, point.low) for point in reversed(banded)
        ]
        curves.append(
            {
                "label": one.label,
                "line": " ".join(f"{x(point.x)},{y(point.y)}" for point in one.points),
                "band": " ".join(f"{x(a)},{y(b)}" for a, b in edge if b is not None),
                "marks": [_mark(point, x(point.x), y(point.y)) for point in one.points]
                if one.marks
                else [],
            }
        )
    return {
        "title": title,
        "y_label": y_label,
        "x_label": x_label,
        "curves": curves,
        "x_ticks": [(x(value), _number(value)) for value in _ticks(*x_range)],
        "y_ticks": [(y(value), _number(value)) for value in _ticks(*y_range)],
        "box": {
            "width": WIDTH,
            "height": HEIGHT,
            "left": LEFT,
            "right": WIDTH - RIGHT,
            "top": TOP,
            "bottom": HEIGHT - BOTTOM,
        },
    }


def _is_drawable(point: Point) -> bool:
    values = [value for value in (point.x, point.y, point.low, point.high) if value is not None]
    return all(math.isfinite(value) and abs(value) < LARGEST for value in values)


def of_steps(rows: Iterable[Mapping[str, Any]], key: str) -> list[Point]:
    """Return the points of evaluation.json's `steps`, without figures that are not finite."""
    return [
        Point(row["step"], row[key]["mean"], *(row[key]["ci95"] or (None, None)))
        for row in rows
        if row[key]["mean"] is not None
    ]


def _mark(point: Point, x: float, y: float) -> dict[str, Any]:
    text = f"step {_number(point.x)}: {point.y:.4f}"
    if point.low is not None and point.high is not None:
        text += f" (95 % interval {point.low:.4f} to {point.high:.4f})"
    return {"x": x, "y": y, "text": text}


def _extent(points: Sequence[Point]) -> list[float]:
    return [
        value for point in points for value in (point.y, point.low, point.high) if value is not None
    ]


def _range(values: Sequence[float], margin: float) -> tuple[float, float]:
    """Return the least and the largest value, with a margin at both ends. It is not empty."""
    low, high = min(values), max(values)
    room = (high - low) * margin or (abs(high) * 0.05 or 1.0) * (low == high)
    return low - room, high + room


def _ticks(low: float, high: float) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    values = MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [float(value) for value in values if low <= value <= high]


def _number(value: float) -> str:
    return f"{value:.6g}"
