"""The table of figures of a page, and numbers as a person reads them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from qzo_diffusion.evaluate.scorer import content_name


def capital(name: str) -> str:
    """Return a name with a capital letter at its beginning."""
    return f"{name[0].upper()}{name[1:]}"


def figure_rows(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of evaluation.json: name, base, begun, tuned, delta, ci95, sure, remark."""
    style, clip, loss = evaluation["style"], evaluation["clip_score"], evaluation["validation_loss"]
    similarity, spread = style["similarity"], style["diversity"]
    content = f"{capital(content_name(evaluation['scorer']['note']))} of the content"
    kept = "cosine, prompts without words of style"
    rows = [
        row("Similarity to the style", _means(similarity), similarity, "cosine, higher is closer"),
        row(content, _means(clip), clip, kept),
        *_rows_by_trigger(evaluation.get("trigger"), content),
        row("KID to the style", _states(style["kid"]), style["kid"], "lower is closer"),
        row("CMMD to the style", _states(style["cmmd"]), style["cmmd"], "lower is closer"),
        *_rows_of_loss(loss),
    ]
    before = spread.get("begun", spread["base"])
    unknown = spread["tuned"] is None or before is None
    difference = {"delta": None if unknown else spread["tuned"] - before}
    remark = f"the style's images: {figure(spread['style'])}"
    return [*rows, row("Diversity", _states(spread, "tuned"), difference, remark)]


def _rows_by_trigger(found: Mapping[str, Any] | None, content: str) -> list[dict[str, Any]]:
    """Return similarity and content of the prompts with the captions' trigger, and of those
    without.
    """
    rows = []
    for name in ("with", "without"):
        part = (found or {}).get(name, {})
        for key, label in (("style", "Similarity to the style"), ("clip", content)):
            if key in part:
                remark = f"{part['n']} prompts {name} the trigger"
                rows.append(row(f"… {label}", _means(part[key]), part[key], remark))
    return rows


def _rows_of_loss(loss: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    if not loss:
        return []
    remark = f"{loss['images']} images, lower is better"
    if not is_finite(loss["tuned"]):
        remark = f"diverged: no finite number; {remark}"
    bands = [
        row(f"Held-out loss at sigma {band['sigma']:g}", _states(band, "tuned"), band, "")
        for band in loss["bands"]
    ]
    return [row("Held-out loss", _states(loss, "tuned"), loss, remark), *bands]


def _means(found: Mapping[str, Any]) -> dict[str, Any]:
    return {"base": found["base_mean"], "begun": found.get("begun_mean"), "tuned": found["mean"]}


def _states(found: Mapping[str, Any], tuned: str = "value") -> dict[str, Any]:
    return {"base": found["base"], "begun": found.get("begun"), "tuned": found[tuned]}


def row(
    name: str, states: Mapping[str, Any], difference: Mapping[str, Any], remark: str
) -> dict[str, Any]:
    """Return a row of the table.

    Args:
        states: values of base, begun and tuned.
        difference: `delta`, and its interval if there is one.
    """
    delta, interval = difference["delta"], difference.get("delta_ci95")
    sure = _is_interval(interval) and not interval[0] <= 0 <= interval[1]
    found = {"name": name, "delta": delta, "ci95": interval, "sure": sure, "remark": remark}
    return {**found, **states}


def _is_interval(value: Any) -> TypeGuard[Sequence[float]]:
    return value is not None and all(map(is_finite, value))


def figure(value: Any, sign: bool = False) -> str:
    """Format a number for a person, with a dash for none and for one that is not finite."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool | str) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    small = value != 0 and abs(value) < 0.001
    return f"{value:{'+' if sign else ''}{'.2e' if small else '.4f'}}"


def interval(value: Sequence[float] | None) -> str:
    if value is None or not _is_interval(value):
        return "–"
    return f"{figure(value[0], True)} to {figure(value[1], True)}"


def percent(value: float | None) -> str:
    return f"{value:.0%}" if value is not None and math.isfinite(value) else "–"


def cell(value: Any) -> str:
    """Format a value of dataset.json: hashes are shortened, lists joined."""
    if isinstance(value, list):
        return "; ".join(map(str, value))
    text = "–" if value is None else str(value)
    return f"{text[:12]}…" if len(text) == 64 and text.isalnum() else text


def is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
