"""CLIP score: how well does a picture match its prompt?

    raw         cos(image features, text features)
    x100        100 · cos, mean over pairs, floored at 0
                as torchmetrics reports it, ViT-L/14, no prefix
    original    2.5 · max(cos, 0), prefix "A photo depicts "
                CLIPScore (Hessel et al. 2021, arXiv 2104.08718), ViT-B/32

Figures of two scorers are never comparable, so each result names its scorer.
"""

import math
import re
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from qzo_diffusion.evaluate.intervals import gained, summary
from qzo_diffusion.evaluate.scorer import Scorer

PREFIX = "A photo depicts "


def cosines(images: Tensor, texts: Tensor) -> list[float]:
    """Return the cosine of each image with the text of its row; features [N, D] of any length."""
    found: list[float] = F.cosine_similarity(images.double(), texts.double()).tolist()
    return found


def as_torchmetrics(cosine: Sequence[float]) -> float:
    """Return max(mean of 100 · cos, 0), which is torchmetrics' CLIPScore."""
    return max(100 * math.fsum(cosine) / len(cosine), 0.0)


def as_original(cosine: Sequence[float]) -> float:
    """Return the mean of 2.5 · max(cos, 0), which is the paper's CLIPScore."""
    return math.fsum(2.5 * max(value, 0.0) for value in cosine) / len(cosine)


def score(
    scorer: Scorer,
    images: Tensor,
    texts: Sequence[str],
    base: Tensor | None = None,
    begun: Tensor | None = None,
) -> dict[str, object]:
    """Score a set of pictures, and its paired difference from the base's pictures.

    A run that began with another run's scales is compared with those instead.

    Args:
        images, base, begun: features of pictures of the same texts, [N, D].
        texts: the content that each picture must show, without words of style.
    """
    plain, prefixed = (
        scorer.text_features(texts),
        scorer.text_features([PREFIX + text for text in texts]),
    )
    cosine, with_prefix = cosines(images, plain), cosines(images, prefixed)
    result: dict[str, object] = {"model": scorer.name, "note": scorer.note, **summary(cosine)}
    result |= {"x100": as_torchmetrics(cosine), "original": as_original(cosine)}
    result["with_prefix"] = {
        "mean": summary(with_prefix)["mean"],
        "x100": as_torchmetrics(with_prefix),
    }
    result["with_prefix"] |= {"original": as_original(with_prefix)}  # type: ignore[operator]
    result["truncated_prompts"] = scorer.truncated(texts)
    if base is not None:
        before = None if begun is None else cosines(begun, plain)
        result |= gained(cosine, cosines(base, plain), before)
    return result


_STYLE_WORDS = re.compile(
    r"(,\s*|\s+in\s+)(?:(?!in\b)[\w&-]+\s+){0,4}style\b(\s+of\s+[^,]+)?", re.IGNORECASE
)
_TRIGGER = re.compile(
    r"(,\s*|\s+)?(\b(in|by|as)\s+)?(\b(an?|the)\s+)?\0(\s+style\b)?", re.IGNORECASE
)


def content_of(prompt: str, trigger: str | None = None) -> str:
    """Return a prompt without words of style: ", noto style", " in [trigger] style", and the
    trigger wherever else it stands.
    """
    text = prompt.replace("\0", "")
    if trigger:
        text = _TRIGGER.sub("", re.sub(rf"(?<!\w){re.escape(trigger)}(?!\w)", "\0", text))
    return re.sub(r"\s+", " ", _STYLE_WORDS.sub("", text)).strip(" ,")
