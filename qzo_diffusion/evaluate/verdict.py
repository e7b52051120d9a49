"""Explain figures in sentences for a person.

A change counts only if its interval leaves out zero. The distance to the style (KID, CMMD), content
and held-out loss may each veto: a similarity that rose does not make up for them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from qzo_diffusion.evaluate.scorer import content_name
from qzo_diffusion.evaluate.task_score import TaskScore

# raw cosine: a person sees no loss of content in a smaller fall
CONTENT_MAY_FALL = 0.02
BASE = "the base"
UNSUITED = "this scorer was not made for such pictures"
NOT_TOLD_APART = "this scorer does not tell the style from the base's pictures"
AWAY = "the pictures moved away from the style"
TOO_FEW = "too few images show whether this scorer tells the style from the base's pictures"
REASONS = {"unsuited": UNSUITED, "not told apart": NOT_TOLD_APART, "too few": TOO_FEW}

Finding = dict[str, str]  # sign ("good", "bad" or "open") and text


def verdict(results: Mapping[str, Any]) -> list[Finding]:
    """Return the verdict on a run in one sentence, then a sentence for each of its reasons."""
    style = results["style"]
    found = [overall(results), _style(results), _distance(style), _content(results["clip_score"])]
    found += [_loss(results), _copies(style), _estimate(results.get("signal"))]
    return [one for one in found if one is not None]


def overall(results: Mapping[str, Any]) -> Finding:
    """Return the verdict: worse than the base, no verdict on style, or the changes of style and
    content.
    """
    style, content = style_sign(results), content_sign(results["clip_score"])
    harm = _harm(results)
    if harm or style == "bad":
        against = results.get("compared_with", BASE)
        seen = {"good": "though the style came", "unsuited": f"no verdict on style ({UNSUITED})"}
        parts = [*harm, seen.get(style, "style not seen")] if harm else [AWAY]
        return _finding("bad", f"Worse than {against}: {', '.join(parts)}.")
    if style in REASONS:
        return _finding("open", f"No verdict on style: {REASONS[style]}.")
    return _without_harm(style, content)


def _without_harm(style: str, content: str) -> Finding:
    if style == "good" and content == "good":
        return _finding("good", "The style came and the content stayed.")
    if style == "good":
        return _finding("open", "The style came; whether the content stayed is not certain.")
    rest = "the content stayed" if content == "good" else "nor is one of content"
    return _finding("open", f"No change of style is certain; {rest}.")


def _harm(results: Mapping[str, Any]) -> list[str]:
    """Return the reasons why a run is worse than before it, whatever its style."""
    loss, harm = results.get("validation_loss"), []
    if diverged(results):
        harm.append("the run diverged (its held-out loss is no finite number)")
    if content_sign(results["clip_score"]) == "bad":
        harm.append("content lost")
    if loss and _sign(loss.get("delta_ci95"), up_is_good=False) == "bad":
        harm.append("the held-out loss rose")
    return harm


def diverged(results: Mapping[str, Any]) -> bool:
    """Return whether the run has a held-out loss that is not finite."""
    loss = results.get("validation_loss")
    return loss is not None and not _is_number(loss["tuned"])


def style_sign(results: Mapping[str, Any]) -> str:
    """Return "good", "bad" or "open"; or "unsuited", "not told apart" or "too few" if similarity is
    no evidence.

    Pictures that are certainly farther from the style are "bad" also if the scorer cannot recognize
    the style.
    """
    style = results["style"]
    similarity, kid, cmmd = (style.get(name) or {} for name in ("similarity", "kid", "cmmd"))
    if not results.get("scorer", {}).get("suits", True):
        return "unsuited"
    if _sign(kid.get("delta_ci95"), up_is_good=False) == "bad":
        return "bad"
    interval = (style.get("control") or {}).get("ci95")
    if not _is_interval(interval):
        return "too few"
    if interval[0] <= 0:
        return "not told apart"
    sign = _sign(similarity.get("delta_ci95"), up_is_good=True)
    distances = [one.get("delta") for one in (kid, cmmd)]
    farther = [one for one in distances if _is_number(one) and one > 0]
    return "open" if sign == "good" and farther else sign


def content_sign(clip: Mapping[str, Any]) -> str:
    """Return "good" (no fall of more than CONTENT_MAY_FALL), "bad" (certainly such a fall) or
    "open".
    """
    interval = clip.get("delta_ci95")
    if not _is_interval(interval):
        return "open"
    if interval[0] >= -CONTENT_MAY_FALL:
        return "good"
    return "bad" if interval[1] < -CONTENT_MAY_FALL else "open"


def _style(results: Mapping[str, Any]) -> Finding:
    similarity = results["style"]["similarity"]
    change = _change(similarity["delta"], similarity["delta_ci95"])
    sign = style_sign(results)
    if sign in REASONS:
        text = f"Similarity to the style's images {change} says nothing: {REASONS[sign]}."
        return _finding("open", text)
    words = {
        "good": "The style came",
        "bad": "The pictures moved away from the style",
        "open": "No change of style is certain",
    }
    return _finding(sign, f"{words[sign]}: similarity to the style's images {change}.")


def _distance(style: Mapping[str, Any]) -> Finding | None:
    kid = style.get("kid") or {}
    before, value = kid.get("begun", kid.get("base")), kid.get("value")
    if not (_is_number(before) and _is_number(value)):
        return None
    text = f"Distance to the style's images (KID): {before:.3f} to {value:.3f}, "
    text += f"{_change(kid['delta'], kid['delta_ci95'])}, lower is closer."
    return _finding(_sign(kid["delta_ci95"], up_is_good=False), text)


def _content(clip: Mapping[str, Any]) -> Finding:
    name = content_name(clip.get("note", ""))
    change, sign = _change(clip["delta"], clip["delta_ci95"]), content_sign(clip)
    words = {
        "good": "Prompts are still followed",
        "bad": "Content was lost",
        "open": "Whether content was lost is not certain",
    }
    if not _is_interval(clip["delta_ci95"]):
        words["open"] = "One prompt cannot tell whether prompts are still followed"
    return _finding(sign, f"{words[sign]}: {name} {change}.")


def of_task(score: TaskScore) -> list[Finding]:
    """Return the verdict on a language model's task; empty without two values or without an
    interval.
    """
    if score.diverged is not None:
        text = f"The run diverged: {score.name} is no finite number at step {score.diverged}."
        return [_finding("bad", text)]
    ends = score.ends()
    found = score.difference(*ends) if ends else None
    if ends is None or found is None or found["delta_ci95"] is None:
        return []
    sign = _sign(found["delta_ci95"], up_is_good=True)
    words = {"good": "rose", "bad": "fell", "open": "did not change for certain"}
    share = f"{ends[0]:.3f} to {ends[1]:.3f}"
    change = _change(found["delta"], found["delta_ci95"])
    return [_finding(sign, f"{score.name} {words[sign]}: {share}, {change}.")]


def _loss(results: Mapping[str, Any]) -> Finding | None:
    loss = results.get("validation_loss")
    if not loss:
        return None
    start = loss.get("begun", loss["base"])
    before = f"{start:.3f}" if _is_number(start) else "no finite number"
    if diverged(results):
        return _finding("bad", f"The held-out loss is no finite number; before it was {before}.")
    sign = _sign(loss["delta_ci95"], up_is_good=False)
    words = {"good": "fell", "bad": "rose", "open": "did not change for certain"}
    change = _change(loss["delta"], loss["delta_ci95"])
    return _finding(
        sign, f"The held-out loss {words[sign]}: {before} to {loss['tuned']:.3f}, {change}."
    )


def _copies(style: Mapping[str, Any]) -> Finding | None:
    nearest = style["nearest"]
    if "copies" not in nearest:
        return None
    known = {"held_out_max": "the style's held-out images", "base_max": "the base's pictures"}
    others = " and ".join(name for key, name in known.items() if key in nearest)
    copies = nearest["copies"]
    if not copies:
        text = f"No picture is closer to a training image than {others} are: nothing was copied."
        return _finding("good", text)
    text = f"{copies} of {style['similarity']['n']} pictures are closer to a training image than "
    return _finding("open", f"{text}{others} are: look for copies.")


def _estimate(signal: Mapping[str, Any] | None) -> Finding | None:
    if not signal:
        return None
    interval = signal["base"]["agreement_ci95"]
    carries = _is_interval(interval) and interval[0] > 0
    return _finding("good" if carries else "bad", signal["sentence"])


def _finding(sign: str, text: str) -> Finding:
    return {"sign": sign, "text": text}


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def _is_interval(interval: Any) -> TypeGuard[Sequence[float]]:
    return interval is not None and all(map(_is_number, interval))


def _sign(interval: Sequence[float] | None, up_is_good: bool) -> str:
    if interval is None or not _is_interval(interval) or interval[0] <= 0 <= interval[1]:
        return "open"
    return "good" if (interval[0] > 0) == up_is_good else "bad"


def _change(delta: float | None, interval: Sequence[float] | None) -> str:
    if delta is None or not _is_number(delta):
        return "(no finite number)"
    if interval is None or not _is_interval(interval):
        return f"{delta:+.3f} (one value has no interval)"
    return f"{delta:+.3f} (95 % interval {interval[0]:+.3f} to {interval[1]:+.3f})"
