"""Rewards in a scorer's features: match with the prompt, similarity to a style, a linear head."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.evaluate import clip_score, style
from qzo_diffusion.evaluate.scorer import Scorer
from qzo_diffusion.quant.header import read_header


class Features:
    """A scorer that several rewards share: the pictures of one call are encoded once."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self._pictures: Sequence[Image.Image] | None = None
        self._found = torch.empty(0)
        self._texts: dict[str, Tensor] = {}

    def of_pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Return unit features [N, D] of the pictures; the last list is remembered."""
        if self._pictures is not pictures:
            self._found, self._pictures = self.scorer.image_features(pictures), pictures
        return self._found

    def of_texts(self, texts: Sequence[str]) -> Tensor:
        """Return unit features [N, D] of the texts; each text is encoded once in a run."""
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        if new:
            self._texts |= zip(new, self.scorer.text_features(new), strict=True)
        return torch.stack([self._texts[text] for text in texts])


class ClipScore:
    """The cosine of a picture and its prompt without words of style."""

    def __init__(self, features: Features, trigger: str | None = None) -> None:
        self._features, self._trigger = features, trigger

    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        contents = [clip_score.content_of(text, self._trigger) or text for text in prompts]
        found = self._features.of_pictures(pictures)
        return clip_score.cosines(found, self._features.of_texts(contents))


class StyleSimilarity:
    """The cosine of a picture and the mean of a style's pictures.

    Args:
        pictures: those of the style, at least one.
    """

    def __init__(self, features: Features, pictures: Sequence[Image.Image]) -> None:
        self._features = features
        self._style = features.scorer.image_features(pictures)

    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        return style.similarity(self._features.of_pictures(pictures), self._style)


class LinearHead:
    """weight · features + bias, such as LAION's aesthetic predictors.

    Args:
        weight: [D]. bias: a number.
    """

    def __init__(self, features: Features, weight: Tensor, bias: float) -> None:
        self._features, self._weight, self._bias = features, weight.double(), bias

    @classmethod
    def load(cls, features: Features, file: Path) -> "LinearHead":
        """Read `weight` ([D] or [1, D]) and, if there is one, `bias` ([1]) from safetensors.

        Raises:
            ModelError: it is no such file, or was made for features of another length.
        """
        weight, bias = _read_head(file)
        length = features.scorer.text_features(["a picture"]).shape[1]
        if weight.numel() != length:
            raise _no_head(
                file,
                f"a weight for {weight.numel()} features; {features.scorer.name} has {length}",
            )
        return cls(features, weight, bias)

    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        found = self._features.of_pictures(pictures).double() @ self._weight + self._bias
        values: list[float] = found.tolist()
        return values


def _read_head(file: Path) -> tuple[Tensor, float]:
    from safetensors.torch import load_file

    read_header(file)
    try:
        tensors = load_file(file)
        weight, bias = tensors["weight"].flatten(), tensors.get("bias", torch.zeros(1)).flatten()
        if not weight.numel() or bias.numel() != 1 or not weight.dtype.is_floating_point:
            raise ValueError(f"shapes {[tuple(one.shape) for one in tensors.values()]}")
    except KeyError:
        raise _no_head(file, f"tensors {', '.join(sorted(tensors))}") from None
    except Exception as error:  # safetensors raises errors of its own
        raise _no_head(file, str(error)) from None
    if not (torch.isfinite(weight).all() and torch.isfinite(bias).all()):
        raise _no_head(file, "numbers that are not finite")
    return weight, float(bias)


def _no_head(file: Path, reason: str) -> ModelError:
    return ModelError(
        f"{file} is no linear head: {reason}",
        "safetensors with weight [1, D] and bias [1], for features of the scorer",
        "convert the head, or choose the scorer that it was made for: reward.scorer=NAME",
    )
