"""Scores of a run on rewards by step, as rewards.json holds them: on prompts that are not trained,
at equal seeds.

Rows are {step, reward: [of each prompt], each: {name: [...]}, second: [...]}; null stands for a
picture without a score. Of a run on votes there is only the second score.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qzo_diffusion.evaluate import charts, intervals

TRAINED, SECOND = "reward", "second"
Rows = Sequence[Mapping[str, Any]]


def values(row: Mapping[str, Any], key: str) -> list[float]:
    """Return the scores of a row, NaN for a picture that has none."""
    return [math.nan if value is None else float(value) for value in row[key]]


def change(rows: Rows, key: str) -> dict[str, Any]:
    """Return the change of a score from the first row to the last, paired over prompts."""
    last, first = values(rows[-1], key), values(rows[0], key)
    return {"mean": math.fsum(last) / len(last), **intervals.paired(last, first)}


def gamed(rows: Rows) -> bool:
    """Whether the reward rose and the second score fell since the first row, each with a 95 %
    interval without zero: the run may have found a weakness of the reward.
    """
    if len(rows) < 2 or any(
        key not in row for key in (TRAINED, SECOND) for row in (rows[0], rows[-1])
    ):
        return False
    rise, fall = (change(rows, key)["delta_ci95"] for key in (TRAINED, SECOND))
    return bool(rise and fall and rise[0] > 0 and fall[1] < 0)


def of_run(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return key and name of the scores that rewards.json has."""
    rewards = list(found["rewards"])
    names = [(TRAINED, "reward" if len(rewards) > 1 else rewards[0])] if rewards else []
    return names + ([(SECOND, found[SECOND])] if found[SECOND] else [])


def score_charts(found: Mapping[str, Any]) -> list[dict[str, Any] | None]:
    """Return a chart of each score by step, with the interval of its mean over prompts."""
    titles = {TRAINED: "What is tuned", SECOND: "Only reported"}
    return [
        charts.chart(f"{titles[key]}: {name}", [_series(found["steps"], key, name)], "score")
        for key, name in of_run(found)
    ]


def _series(rows: Rows, key: str, name: str) -> charts.Series:
    summaries = [
        {"step": row["step"], key: intervals.summary(values(row, key))}
        for row in rows
        if key in row
    ]
    return charts.Series(name, charts.of_steps(summaries, key), marks=True)


def findings(found: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return what the scores say, as sentences with a sign."""
    rows = found["steps"]
    if len(rows) < 2:
        return []
    sentences = [_finding(rows, key, name) for key, name in of_run(found) if key in rows[0]]
    if gamed(rows):
        text = "The reward rises while the second score falls: look at the pictures."
        return [{"sign": "bad", "text": text}, *sentences]
    return sentences


def _finding(rows: Rows, key: str, name: str) -> dict[str, str]:
    moved = change(rows, key)
    low, high = moved["delta_ci95"] or (math.nan, math.nan)
    what = "The reward" if key == TRAINED else "The second score"
    text = (
        f"{what} {name} goes from {moved['base_mean']:.4f} to {moved['mean']:.4f} on "
        f"{len(rows[0][key])} prompts that are not trained"
    )
    if not low <= 0 <= high and math.isfinite(low):
        sign = "good" if low > 0 else "bad"
        return {"sign": sign, "text": f"{text} ({low:+.4f} to {high:+.4f})."}
    return {"sign": "open", "text": f"{text}; that may be chance."}
