"""Batches for the scorer: drawings, some treated, all changed at random, with captions that say no
more than is still to be seen.
"""

import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from benchmarks.scorer.augment import augment
from benchmarks.scorer.drawings import STYLES, Concepts
from benchmarks.tiny.lessons import captions_of, knowledge
from benchmarks.tiny.treatments import TAUGHT, treat
from benchmarks.tiny.vocabulary import build_clip_tokenizer

# of a batch's concepts that come in two styles, told apart by the style's words alone
STYLED_PAIRS = 1 / 8
TREATED = 1 / 4  # of the others, before they are changed at random


def build_tokenizer(data: Path, vocabulary: int, length: int) -> CLIPTokenizer:
    """Knows the words of all names and tags, and of the embedded model's captions."""
    meta = json.loads((data / "meta.json").read_text())
    names = [entry["name"] for entry in meta] * 20 + [entry["tags"] for entry in meta] * 10
    return build_clip_tokenizer(captions_of(knowledge()) + names, vocabulary, length)


class Captions:
    """Token ids of captions by text, made once."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        self.tokenizer = tokenizer
        self._known: dict[str, Tensor] = {}

    def __call__(self, texts: list[str]) -> Tensor:
        for text in texts:
            if text not in self._known:
                ids = self.tokenizer(
                    text, padding="max_length", truncation=True, return_tensors="pt"
                )
                self._known[text] = ids.input_ids[0]
        return torch.stack([self._known[text] for text in texts])


def caption(name: str, tags: list[str], words: list[str], chances: Tensor) -> str:
    """The name, often with more around it.

    words: of style and treatment, where the drawing still has them."""
    form, which = float(chances[0]), int(float(chances[1]) * len(tags))
    if words:
        named = ", ".join([name, *words])
        return named if form < 0.8 else f"a drawing of {named}"
    if form < 0.55:
        return name
    if form < 0.7:
        return f"a drawing of {name}"
    if form < 0.85:
        return f"{name}, {tags[which]}"
    return f"{tags[which]}, {name}"


def treat_some_(images: Tensor, may: Tensor, generator: torch.Generator) -> list[str | None]:
    """Treat a share of the images [N, 3, H, W] in [0, 1] where `may` says so; the treatments'
    names.
    """
    which = torch.randint(len(TAUGHT), (len(images),), generator=generator)
    chosen = may & (torch.rand(len(images), generator=generator) < TREATED)
    names: list[str | None] = [None] * len(images)
    for index, name in enumerate(TAUGHT):
        rows = (chosen & (which == index)).nonzero().flatten()
        if len(rows):
            images[rows] = treat(name, (images[rows] * 255).byte()).float() / 255
            for row in rows.tolist():
                names[row] = name
    return names


def draw_rows(
    concepts: Concepts, batch: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Concepts of a batch, two styles of each that it exists in, and which of them come twice.

    Rows at the end are the first ones once more, in their second style."""
    pairs = int(batch * STYLED_PAIRS)
    rows = torch.randperm(len(concepts), generator=generator)[: batch - pairs]
    rows = torch.cat([rows, rows[:pairs]])
    chances = torch.rand(len(STYLES), batch, generator=generator) * concepts.usable[:, rows]
    order = chances.argsort(0, descending=True)  # of styles, usable ones first
    first, second = order[0], order[1]
    first[-pairs:] = order[1, :pairs]
    place = torch.arange(batch)
    return rows, first, second, (place < pairs) | (place >= batch - pairs)


def draw_batch(
    concepts: Concepts, batch: int, captions: Captions, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Changed drawings [batch, 3, 64, 64] in [-1, 1], and the token ids of their captions."""
    rows, first, second, paired = draw_rows(concepts, batch, generator)
    plain, other = (concepts.images[style, rows].float() / 255 for style in (first, second))
    treatments = treat_some_(plain, ~paired, generator)
    images, kept = augment(plain, other, generator)
    images = torch.where((paired & ~kept).view(-1, 1, 1, 1), plain, images)
    styled = paired | (kept & (torch.rand(batch, generator=generator) < 0.4))
    forms, names = torch.rand(batch, 2, generator=generator), list(STYLES.values())
    texts = []
    for i, row in enumerate(rows.tolist()):
        words = [names[first[i]]] if styled[i] else []
        treatment = treatments[i]
        if treatment is not None and kept[i]:
            words.append(treatment)
        texts.append(caption(concepts.names[row], concepts.tags[row], words, forms[i]))
    return 2 * images - 1, captions(texts)
