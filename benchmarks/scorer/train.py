"""Train a small CLIP, in open_clip's own architecture, to name the drawings: contrastive loss over
concepts of a batch.

A ResNet, not a ViT: at equal time on a CPU core it sees four times as many drawings.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.swa_utils import update_bn
from transformers import CLIPTokenizer

from benchmarks.scorer.batches import Captions, build_tokenizer, draw_batch
from benchmarks.scorer.drawings import HELD_OUT_STYLE, STYLES, Concepts, load_concepts, split
from benchmarks.tiny.training import Recipe, bf16_is_faster, train_resumable
from qzo_diffusion import resources

VOCABULARY, PROMPT_TOKENS = 4096, 24
MODEL: dict[str, Any] = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 32},
    "text_cfg": {
        "context_length": PROMPT_TOKENS,
        "vocab_size": VOCABULARY,
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
EXPORT_FOLDER = resources.PACKAGE / "models" / "scorer"
HELD_OUT = "held_out.json"  # names of the concepts that were kept out, beside the weights


def build_model(seed: int = 0) -> CLIP:
    torch.manual_seed(seed)
    return CLIP(**MODEL).to(memory_format=torch.channels_last)


def contrastive_loss(model: CLIP, images: Tensor, ids: Tensor, bf16: bool) -> Tensor:
    """CLIP's loss (arXiv 2103.00020): each drawing must find its caption among the batch's, and
    each caption its drawing.
    """
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
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
    data: Path, work: Path, recipe: Recipe, *, batch: int = 256
) -> tuple[CLIP, CLIPTokenizer]:
    """Resumable. Leaves the averaged weights, with statistics of their own."""
    model, captions = (
        build_model(recipe.seed),
        Captions(build_tokenizer(data, VOCABULARY, PROMPT_TOKENS)),
    )
    everything = load_concepts(data, list(STYLES))
    concepts = everything.part(split(everything.names)[0])

    def loss(generator: torch.Generator, bf16: bool) -> Tensor:
        return contrastive_loss(model, *draw_batch(concepts, batch, captions, generator), bf16)

    trial = torch.Generator().manual_seed(0)
    bf16 = bf16_is_faster(lambda bf16: loss(trial, bf16))
    train_resumable(
        model,
        lambda _step, generator: loss(generator, bf16),
        recipe,
        checkpoint=work / "scorer.safetensors",
    )
    settle_statistics_(model, concepts, batch, captions, recipe.seed)
    return model, captions.tokenizer


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


def export(model: CLIP, tokenizer: CLIPTokenizer, data: Path, folder: Path) -> int:
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
    tokenizer.save_pretrained(folder)
    names = load_concepts(data, [HELD_OUT_STYLE]).names
    held_out = [names[index] for index in split(names)[1]]
    (folder / HELD_OUT).write_text(json.dumps(held_out, indent=1) + "\n")
    return sum(file.stat().st_size for file in folder.iterdir())
