"""CLIP score: does a picture show what its prompt says?

    raw         cos(image features, text features)
    x100        100 · cos, mean over pairs, floored at 0      as torchmetrics reports it, ViT-L/14, no prefix
    original    2.5 · max(cos, 0), prefix "A photo depicts "   CLIPScore (Hessel et al. 2021, arXiv 2104.08718), ViT-B/32

Any open_clip model works. Figures of two scorers are never comparable, so each result names its scorer.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from qzo_diffusion.core.errors import ConfigError, ModelError
from qzo_diffusion.evaluate.intervals import paired, summary

DEFAULT_SCORER = "ViT-L-14-quickgelu/openai"
EMBEDDED = "embedded"
PREFIX = "A photo depicts "
EMBEDDED_NOTE = "embedded scorer, not comparable with CLIP ViT-L/14"


class Scorer(Protocol):
    """What scores need: unit features, fp32 on the CPU, [N, D]."""

    name: str
    note: str

    def image_features(self, images: Sequence[Image.Image]) -> Tensor: ...

    def text_features(self, texts: Sequence[str]) -> Tensor: ...

    def truncated(self, texts: Sequence[str]) -> int:
        """How many of the texts are longer than the text tower reads."""
        ...


@dataclass
class OpenClipScorer:
    """An open_clip model in fp32. The features of an item do not depend on the others of its batch, up to rounding."""

    name: str
    note: str
    model: Any
    preprocess: Any
    tokenizer: Any
    device: torch.device
    batch_size: int = 16

    @torch.no_grad()
    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        found = []
        for start in tqdm(range(0, len(images), self.batch_size), desc="score images", leave=False):
            pixels = torch.stack([self.preprocess(image.convert("RGB")) for image in images[start : start + self.batch_size]])
            found.append(self.model.encode_image(pixels.to(self.device)).float().cpu())
        return F.normalize(torch.cat(found), dim=1)

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        found = []
        for start in range(0, len(texts), self.batch_size):
            ids = self.tokenizer(list(texts[start : start + self.batch_size]))
            found.append(self.model.encode_text(ids.to(self.device)).float().cpu())
        return F.normalize(torch.cat(found), dim=1)

    def truncated(self, texts: Sequence[str]) -> int:
        """A text that is cut ends with another token than the same text with more room has at that place."""
        length = self.tokenizer.context_length
        cut, whole = self.tokenizer(list(texts)), self.tokenizer(list(texts), context_length=2 * length)
        return int((cut != whole[:, :length]).any(1).sum())


def load_scorer(name: str, device: torch.device, embedded: Path, batch_size: int = 16) -> Scorer:
    """A scorer by name: "embedded", "MODEL/PRETRAINED" of open_clip, or a folder with open_clip_config.json.

    PRETRAINED is one of open_clip's tags, whose weights must be in the local cache, or a safetensors file.

    Args:
        embedded: the folder of the scorer that ships with the package.

    Raises:
        ConfigError: no such model or tag.
        ModelError: its weights are not here, are pickles, or do not fit.
    """
    import open_clip

    folder = embedded if name == EMBEDDED else Path(name)
    if name == EMBEDDED or folder.is_dir():
        source, pretrained = f"local-dir:{folder}", None
        _check_folder(folder)
    else:
        source, _, pretrained = name.partition("/")
        _check_name(open_clip, name, source, pretrained)
    try:
        model, preprocess = open_clip.create_model_from_pretrained(source, pretrained, device=device, weights_only=True)
        tokenizer = open_clip.get_tokenizer(source)
    except Exception as error:  # open_clip, safetensors, the Hub's client and torch each raise their own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"the scorer {name!r} can't be loaded: {reason}",
            "weights in the local cache, or a folder with open_clip_config.json and open_clip_model.safetensors",
            "download it once where there is a network, or pass --scorer FOLDER (embedded is for --model tiny only)",
        ) from None
    label, note = ("embedded scorer", EMBEDDED_NOTE) if name == EMBEDDED else (name, "")
    return OpenClipScorer(label, note, model.eval(), preprocess, tokenizer, device, batch_size)


def _check_folder(folder: Path) -> None:
    for file in ("open_clip_config.json", "open_clip_model.safetensors"):
        if not (folder / file).is_file():
            raise ModelError(f"{folder} has no {file}", "a scorer in open_clip's format", "give --scorer another folder")


def _check_name(open_clip: Any, name: str, source: str, pretrained: str) -> None:
    known = open_clip.list_models()
    tags = open_clip.list_pretrained_tags_by_model(source) if source in known else []
    file = Path(pretrained)
    if source not in known or not (pretrained in tags or file.is_file()):
        near = ", ".join(tags[:6]) if source in known else f"{DEFAULT_SCORER}, {EMBEDDED}"
        raise ConfigError(
            f"no scorer {name!r}", f"MODEL/PRETRAINED of open_clip ({near}, ...), a folder, or {EMBEDDED}", "correct --scorer"
        )
    if file.is_file() and file.suffix != ".safetensors":
        raise ModelError(f"{file} is not safetensors", "a safetensors file", "pickles can run code and are not read")


def cosines(images: Tensor, texts: Tensor) -> list[float]:
    """Of each image with the text of its row; features need not be of unit length."""
    found: list[float] = F.cosine_similarity(images.double(), texts.double()).tolist()
    return found


def as_torchmetrics(cosine: Sequence[float]) -> float:
    """max(mean of 100 · cos, 0): torchmetrics' CLIPScore."""
    return max(100 * math.fsum(cosine) / len(cosine), 0.0)


def as_original(cosine: Sequence[float]) -> float:
    """Mean of 2.5 · max(cos, 0): CLIPScore of the paper."""
    return math.fsum(2.5 * max(value, 0.0) for value in cosine) / len(cosine)


def score(scorer: Scorer, images: Tensor, texts: Sequence[str], base: Tensor | None = None) -> dict[str, object]:
    """The figures of one set of pictures, and of the paired difference to the base's pictures where there are some.

    Args:
        images, base: features of pictures of the same texts, [N, D].
        texts: what each picture must show, without words of style.
    """
    plain, prefixed = scorer.text_features(texts), scorer.text_features([PREFIX + text for text in texts])
    cosine, with_prefix = cosines(images, plain), cosines(images, prefixed)
    result: dict[str, object] = {"model": scorer.name, "note": scorer.note, **summary(cosine)}
    result |= {"x100": as_torchmetrics(cosine), "original": as_original(cosine)}
    result["with_prefix"] = {"mean": summary(with_prefix)["mean"], "x100": as_torchmetrics(with_prefix)}
    result["with_prefix"] |= {"original": as_original(with_prefix)}  # type: ignore[operator]
    result["truncated_prompts"] = scorer.truncated(texts)
    if base is not None:
        result |= paired(cosine, cosines(base, plain))
    return result


_STYLE_WORDS = re.compile(r"(,\s*|\s+in\s+)(?:(?!in\b)[\w&-]+\s+){0,4}style\b(\s+of\s+[^,]+)?", re.IGNORECASE)
_TRIGGER = re.compile(r"(,\s*|\s+)?(\b(in|by|as)\s+)?(\b(an?|the)\s+)?\0(\s+style\b)?", re.IGNORECASE)


def content_of(prompt: str, trigger: str | None = None) -> str:
    """The prompt without words of style: ", noto style", " in [trigger] style", and the trigger wherever else it stands."""
    text = prompt.replace("\0", "")
    if trigger:
        text = _TRIGGER.sub("", re.sub(rf"(?<!\w){re.escape(trigger)}(?!\w)", "\0", text))
    return re.sub(r"\s+", " ", _STYLE_WORDS.sub("", text)).strip(" ,")
