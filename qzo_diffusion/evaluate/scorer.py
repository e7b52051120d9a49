"""A scorer: an open_clip model that turns pictures and texts into features. Only this file imports
open_clip.

Weights come from the local cache or from a safetensors file. Pickles can run code and are not read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from qzo_diffusion.core.errors import ConfigError, ModelError
from qzo_diffusion.system.progress import Progress

DEFAULT_SCORER = "ViT-L-14-quickgelu/openai"
EMBEDDED = "embedded"
EMBEDDED_NOTE = "embedded scorer, not comparable with CLIP ViT-L/14"
CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"

# Least share of pixels that equal their right and lower neighbour, in the median image of a set at
# 64 pixels. Drawings have 0.37 (fluent3d) to 0.83 in six styles, and 0.18 or more in 999 of 1000
# sets of ten. Photos have below 0.15 in 28 of the 29 subjects of DreamBooth (median 0.00).
LEAST_FLAT = 0.15
FLAT_SIDE = 64


def content_name(note: str) -> str:
    """Return the name of a scorer's match of picture and prompt: only a CLIP gives a CLIP score."""
    return "content score" if note else "CLIP score"


def flat_share(images: Sequence[Image.Image]) -> float:
    """Return the share of pixels that equal their right and lower neighbour, in the median image.

    It is high for drawings on a plain ground, and near 0 for photos.
    """
    return float(np.median([_flat(image) for image in images]))


def _flat(image: Image.Image) -> float:
    small = image.convert("RGB").resize((FLAT_SIDE, FLAT_SIDE), Image.Resampling.BOX)
    pixels = np.asarray(small)
    right = (pixels[:-1, 1:] == pixels[:-1, :-1]).all(2)
    below = (pixels[1:, :-1] == pixels[:-1, :-1]).all(2)
    return float((right & below).mean())


def suits(note: str, images: Sequence[Image.Image]) -> dict[str, Any]:
    """Return whether a scorer was made for such images, as `suits`, and the figure that decides it.

    The embedded scorer knows drawings on a plain ground; every other one is assumed to know
    everything.
    """
    if note != EMBEDDED_NOTE:
        return {"suits": True, "flat_share": None}
    share = flat_share(images)
    return {"suits": share >= LEAST_FLAT, "flat_share": share, "least_flat_share": LEAST_FLAT}


class Scorer(Protocol):
    """The interface of a scorer: it gives unit features [N, D], fp32 on the CPU."""

    name: str
    note: str

    def image_features(self, images: Sequence[Image.Image]) -> Tensor: ...

    def text_features(self, texts: Sequence[str]) -> Tensor: ...

    def truncated(self, texts: Sequence[str]) -> int:
        """Return how many of the texts are longer than the text tower reads."""
        ...


@dataclass
class OpenClipScorer:
    """An open_clip model in fp32.

    The features of an item do not depend on the others of its batch, up to rounding.
    """

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
        starts = range(0, len(images), self.batch_size)
        for start in Progress(starts, desc="score images", leave=False, disable=len(starts) < 3):
            pixels = torch.stack(
                [
                    self.preprocess(image.convert("RGB"))
                    for image in images[start : start + self.batch_size]
                ]
            )
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
        """Count the texts that the tokenizer cuts.

        A cut text ends with another token than the same text with more room has at that place.
        """
        length = self.tokenizer.context_length
        cut, whole = (
            self.tokenizer(list(texts)),
            self.tokenizer(list(texts), context_length=2 * length),
        )
        return int((cut != whole[:, :length]).any(1).sum())


def load_scorer(name: str, device: torch.device, embedded: Path, batch_size: int = 16) -> Scorer:
    """Load a scorer by name: "embedded", "MODEL/PRETRAINED" of open_clip, or a folder in its
    format.

    PRETRAINED is one of open_clip's tags, whose weights must be in the local cache, or a
    safetensors file.

    Args:
        embedded: the folder of the scorer that ships with the package.

    Raises:
        ConfigError: no such model or tag.
        ModelError: its weights are missing, are pickles, or do not fit.
    """
    import open_clip

    source, options = check_scorer(name, embedded)
    try:
        model, preprocess = open_clip.create_model_from_pretrained(source, device=device, **options)
        tokenizer = open_clip.get_tokenizer(source)
    except Exception as error:  # open_clip, safetensors and torch raise errors of their own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        remedy = "give --scorer a whole model, or download it again"
        raise ModelError(
            f"the scorer {name!r} can't be loaded: {reason}", "weights that fit the model", remedy
        ) from None
    label, note = ("embedded scorer", EMBEDDED_NOTE) if name == EMBEDDED else (name, "")
    return OpenClipScorer(label, note, model.eval(), preprocess, tokenizer, device, batch_size)


def check_scorer(name: str, embedded: Path) -> tuple[str, dict[str, Any]]:
    """Check that a scorer is here, without loading it; raises as `load_scorer` does.

    Returns open_clip's name for it, and further arguments.
    """
    folder = embedded if name == EMBEDDED else Path(name)
    if name == EMBEDDED or folder.is_dir():
        _check_folder(folder)
        return f"local-dir:{folder}", {}
    source, _, pretrained = name.partition("/")
    return source, _options(name, source, pretrained)


def scorer_weights(name: str, embedded: Path) -> Path:
    """Return the file with a scorer's weights; raises as `load_scorer` does."""
    source, options = check_scorer(name, embedded)
    folder = Path(source.removeprefix("local-dir:"))
    return Path(options["pretrained"]) if "pretrained" in options else folder / WEIGHTS


def _check_folder(folder: Path) -> None:
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise ModelError(
                f"{folder} has no {file}",
                "a scorer in open_clip's format",
                "give --scorer another folder",
            )


def _options(name: str, source: str, pretrained: str) -> dict[str, Any]:
    """Return open_clip's arguments for a model with a tag's weights, or with those of a file."""
    import open_clip

    known = open_clip.list_models()
    tags = open_clip.list_pretrained_tags_by_model(source) if source in known else []
    file = Path(pretrained)
    if source not in known or not (pretrained in tags or file.is_file()):
        near = ", ".join(tags[:6]) if tags else f"{DEFAULT_SCORER}, {EMBEDDED}"
        expected = f"MODEL/PRETRAINED of open_clip ({near}, ...), a folder, or {EMBEDDED}"
        raise ConfigError(f"no scorer {name!r}", expected, "correct --scorer")
    if pretrained not in tags:
        if file.suffix != ".safetensors":
            raise ModelError(
                f"{file} is not safetensors",
                "a safetensors file",
                "pickles can run code and are not read",
            )
        return {"pretrained": str(file)}
    facts = open_clip.get_pretrained_cfg(source, pretrained)
    preprocess = {
        f"image_{key}": facts[key]
        for key in ("mean", "std", "interpolation", "resize_mode")
        if facts.get(key)
    }
    return {
        "pretrained": _cached(name, facts),
        "force_quick_gelu": bool(facts.get("quick_gelu")),
        **preprocess,
    }


def _cached(name: str, facts: dict[str, Any]) -> str:
    """Return the file with the weights of a tag.

    Nothing is downloaded in passing: the user decides on a gigabyte.
    """
    from huggingface_hub import try_to_load_from_cache

    owner, _, rest = facts.get("hf_hub", "").strip("/").partition("/")
    repository, _, file = rest.partition("/")
    place = f"{owner}/{repository}"
    if not repository or (file and not file.endswith(".safetensors")):
        remedy = (
            "choose another one, or convert its weights and give --scorer MODEL/FILE.safetensors"
        )
        raise ModelError(
            f"the scorer {name!r} has no weights in safetensors", "one that has", remedy
        )
    found = try_to_load_from_cache(place, file or WEIGHTS)
    if isinstance(found, str):
        return found
    raise ModelError(
        f"the weights of the scorer {name!r} are not in the local cache",
        f"{file or WEIGHTS} of {place}",
        f"hf download {place} {file or WEIGHTS}; or pass --scorer FOLDER ({EMBEDDED} is for "
        "--model tiny)",
    )
