"""Train a small CLIP, in open_clip's own architecture, to name the drawings: contrastive loss over
concepts of a batch.

A ResNet, not a ViT: at equal time on a CPU core it sees four times as many drawings.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.swa_utils import update_bn
from transformers import CLIPTokenizer

from benchmarks.scorer.augment import augment
from benchmarks.scorer.drawings import STYLES, Concepts, load_concepts, split
from benchmarks.tiny.training import train_resumable
from qzo_diffusion import resources

MODEL: dict[str, Any] = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 32},
    "text_cfg": {
        "context_length": 24,
        "vocab_size": 2048,
        "width": 192,
        "heads": 3,
        "layers": 2,
        "hf_tokenizer_name": "tokenizer",  # beside the weights
    },
}
PREPROCESS = {
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
TOKENIZER = resources.tiny_model() / "tokenizer"
EXPORT_FOLDER = resources.PACKAGE / "models" / "scorer"
# of a batch's concepts that come in two styles, told apart by the style's words alone
STYLED_PAIRS = 1 / 8


def build_model(seed: int = 0) -> CLIP:
    torch.manual_seed(seed)
    return CLIP(**MODEL).to(memory_format=torch.channels_last)


class Captions:
    """Token ids of captions by text, made once."""

    def __init__(self) -> None:
        self._tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
        self._known: dict[str, Tensor] = {}

    def __call__(self, texts: list[str]) -> Tensor:
        length = MODEL["text_cfg"]["context_length"]
        for text in texts:
            if text not in self._known:
                ids = self._tokenizer(
                    text,
                    max_length=length,
                    padding="max_length",
                    truncation=True,
                    return_tensors="pt",
                )
                self._known[text] = ids.input_ids[0]
        return torch.stack([self._known[text] for text in texts])


def caption(name: str, tags: list[str], style: str | None, chances: Tensor) -> str:
    """The name, often with more around it; the style's words only where the drawing still has its
    style.
    """
    form, which = float(chances[0]), int(float(chances[1]) * len(tags))
    if style is not None:
        return f"{name}, {STYLES[style]}" if form < 0.8 else f"a drawing of {name}, {STYLES[style]}"
    if form < 0.55:
        return name
    if form < 0.7:
        return f"a drawing of {name}"
    if form < 0.85:
        return f"{name}, {tags[which]}"
    return f"{tags[which]}, {name}"


def draw_batch(
    concepts: Concepts, batch: int, captions: Captions, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Changed drawings [batch, 3, 64, 64] in [-1, 1], and the token ids of their captions."""
    pairs = int(batch * STYLED_PAIRS)
    rows = torch.randperm(len(concepts), generator=generator)[: batch - pairs]
    rows = torch.cat([rows, rows[:pairs]])  # the first `pairs` concepts once more
    chances = torch.rand(len(STYLES), batch, generator=generator) * concepts.usable[:, rows]
    order = chances.argsort(0, descending=True)  # of styles, usable ones first
    first, second = order[0], order[1]
    first[-pairs:] = order[1, :pairs]  # the second time in another style
    plain, other = (concepts.images[style, rows].float() / 255 for style in (first, second))
    images, kept = augment(plain, other, generator)
    must, may = torch.arange(batch) < pairs, torch.rand(batch, generator=generator) < 0.4
    must |= torch.arange(batch) >= batch - pairs
    images = torch.where((must & ~kept).view(-1, 1, 1, 1), plain, images)
    styled = must | (kept & may)
    names, forms = list(STYLES), torch.rand(batch, 2, generator=generator)
    texts = [
        caption(
            concepts.names[row],
            concepts.tags[row],
            names[first[i]] if styled[i] else None,
            forms[i],
        )
        for i, row in enumerate(rows.tolist())
    ]
    return 2 * images - 1, captions(texts)


def contrastive_loss(model: CLIP, images: Tensor, ids: Tensor) -> Tensor:
    """CLIP's loss (arXiv 2103.00020): each drawing must find its caption among the batch's, and
    each caption its drawing.
    """
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pictures = model.encode_image(images.contiguous(memory_format=torch.channels_last))
        texts = model.encode_text(ids)
    logits = (
        model.logit_scale.clamp(max=4.6052).exp()
        * F.normalize(pictures.float(), dim=1)
        @ F.normalize(texts.float(), dim=1).T
    )
    target = torch.arange(len(images))
    return (
        F.cross_entropy(logits, target, label_smoothing=0.05)
        + F.cross_entropy(logits.T, target, label_smoothing=0.05)
    ) / 2


def train(
    data: Path, work: Path, *, steps: int, batch: int = 256, peak_lr: float = 1.5e-3, seed: int = 0
) -> CLIP:
    """Resumable; about a second a step on one core with bf16.

    Leaves the averaged weights, with statistics of their own.
    """
    model, captions = build_model(seed), Captions()
    everything = load_concepts(data, list(STYLES))
    concepts = everything.part(split(everything.names)[0])

    def loss_of_step(_step: int, generator: torch.Generator) -> Tensor:
        return contrastive_loss(model, *draw_batch(concepts, batch, captions, generator))

    train_resumable(
        model,
        loss_of_step,
        checkpoint=work / "scorer.safetensors",
        total_steps=steps,
        peak_lr=peak_lr,
        weight_decay=0.05,
        ema_decay=0.995,
        seed=seed,
    )
    settle_statistics_(model, concepts, batch, captions, seed)
    return model


def settle_statistics_(
    model: CLIP, concepts: Concepts, batch: int, captions: Captions, seed: int
) -> None:
    """Means and variances of the normalisation for the averaged weights, from plain drawings and
    changed ones alike.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    loader = [
        draw_batch(concepts, batch, captions, generator)[0].contiguous(
            memory_format=torch.channels_last
        )
        for _ in range(20)
    ]
    for style in range(len(STYLES)):
        rows = torch.randperm(len(concepts), generator=generator)[:batch]
        plain = concepts.images[style, rows][concepts.usable[style, rows]].float() / 127.5 - 1
        loader.append(plain.contiguous(memory_format=torch.channels_last))
    with torch.no_grad():
        update_bn(loader, model.visual)
    model.eval()


def export(model: CLIP, folder: Path) -> int:
    """Write a folder that `open_clip.create_model_from_pretrained("local-dir:FOLDER")` loads;
    returns its size in bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": MODEL, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n")
    tensors = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(tensors, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    shutil.copy(TOKENIZER / "tokenizer.json", folder / "tokenizer.json")
    facts = json.loads((TOKENIZER / "tokenizer_config.json").read_text())
    facts["model_max_length"] = MODEL["text_cfg"]["context_length"]
    (folder / "tokenizer_config.json").write_text(json.dumps(facts, indent=1) + "\n")
    return sum(file.stat().st_size for file in folder.iterdir())
