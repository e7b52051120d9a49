"""What the figures mean, in sentences for a person.

Only an interval that leaves out zero counts as a change.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from qzo_diffusion.evaluate.task_score import TaskScore

# of raw cosine: less of a fall is no loss of content that a person would see
CONTENT_MAY_FALL = 0.02


def verdict(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """`sign` is "good", "bad" or "open", `text` one sentence, for style, content, held-out loss,
    copying and the estimate.
    """
    similarity, clip = results["style"]["similarity"], results["clip_score"]
    found = [_style(similarity), _content(clip)]
    if results["validation_loss"]:
        found.append(_loss(results["validation_loss"]))
    nearest = results["style"]["nearest"]
    if "copies" in nearest:
        found.append(_copies(nearest, similarity["n"]))
    control = results["style"].get("control")
    if control and control["ci95"] and control["ci95"][0] <= 0:
        text = (
            "The scorer does not tell this style from the base model's own, so its similarity to "
            "the style says little."
        )
        found.append({"sign": "open", "text": text})
    carries = results["signal"]["base"]["agreement_ci95"]
    found.append(
        {
            "sign": "good" if carries and carries[0] > 0 else "bad",
            "text": results["signal"]["sentence"],
        }
    )
    return found


def _style(similarity: Mapping[str, Any]) -> dict[str, str]:
    change = _change(similarity["delta"], similarity["delta_ci95"])
    sign = _sign(similarity["delta_ci95"], up_is_good=True)
    words = {
        "good": "The style came",
        "bad": "The pictures moved away from the style",
        "open": "No change of style is certain",
    }
    return {"sign": sign, "text": f"{words[sign]}: similarity to the style's images {change}."}


def _content(clip: Mapping[str, Any]) -> dict[str, str]:
    change, interval = _change(clip["delta"], clip["delta_ci95"]), clip["delta_ci95"]
    if interval is None:
        return {
            "sign": "open",
            "text": "One prompt cannot tell whether prompts are still followed: "
            f"CLIP score {change}.",
        }
    if interval[0] >= -CONTENT_MAY_FALL:
        return {
            "sign": "good",
            "text": f"Prompts are still followed: CLIP score of the content {change}.",
        }
    if interval[1] < -CONTENT_MAY_FALL:
        return {"sign": "bad", "text": f"Content was lost: CLIP score of the content {change}."}
    return {
        "sign": "open",
        "text": f"Whether content was lost is not certain: CLIP score of the content {change}.",
    }


def of_task(score: TaskScore) -> list[dict[str, str]]:
    """`verdict` for a language model's task; empty while there is nothing to compare, or no
    interval.
    """
    ends = score.ends()
    found = score.difference(*ends) if ends else None
    if ends is None or found is None or found["delta_ci95"] is None:
        return []
    sign = _sign(found["delta_ci95"], up_is_good=True)
    words = {"good": "rose", "bad": "fell", "open": "did not change for certain"}
    share = f"{ends[0]:.3f} to {ends[1]:.3f}"
    return [
        {
            "sign": sign,
            "text": f"{score.name} {words[sign]}: {share}, "
            f"{_change(found['delta'], found['delta_ci95'])}.",
        }
    ]


def _loss(loss: Mapping[str, Any]) -> dict[str, str]:
    sign = _sign(loss["delta_ci95"], up_is_good=False)
    words = {"good": "fell", "bad": "rose", "open": "did not change for certain"}
    share = f"{loss['base']:.3f} to {loss['tuned']:.3f}"
    return {
        "sign": sign,
        "text": f"The held-out loss {words[sign]}: {share}, "
        f"{_change(loss['delta'], loss['delta_ci95'])}.",
    }


def _copies(nearest: Mapping[str, Any], count: int) -> dict[str, str]:
    copies = nearest["copies"]
    if not copies:
        text = (
            "No picture is closer to a training image than the style's held-out images are: "
            "nothing was copied."
        )
        return {"sign": "good", "text": text}
    text = (
        f"{copies} of {count} pictures are closer to a training image than any held-out image is: "
        "look for copies."
    )
    return {"sign": "open", "text": text}


def _sign(interval: Sequence[float] | None, up_is_good: bool) -> str:
    if interval is None or interval[0] <= 0 <= interval[1]:
        return "open"
    return "good" if (interval[0] > 0) == up_is_good else "bad"


def _change(delta: float, interval: Sequence[float] | None) -> str:
    if interval is None:
        return f"{delta:+.3f} (one value has no interval)"
    return f"{delta:+.3f} (95 % interval {interval[0]:+.3f} to {interval[1]:+.3f})"
