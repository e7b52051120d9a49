"""What the denoiser sees in a step: drawings, half of them treated, and captions that say so."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.tiny.drawings import LESSONS_FILE, Knowledge, load_drawings, read_knowledge
from benchmarks.tiny.patches import PatchBasis
from benchmarks.tiny.treatments import ground, treat

# How often each form of a caption is read. The empty one teaches the unconditional branch of
# guidance; the bare name is any taught style.
PLAIN_FORMS = {
    "{name}, {style}": 0.65,
    "{name}": 0.20,
    "a drawing of {name}, {style}": 0.05,
    "": 0.10,
}
TREATED_FORMS = {
    "{name}, {style}, {treatment}": 0.60,
    "{name}, {treatment}": 0.30,
    "": 0.10,
}
TREATED_SHARE = 0.5


@dataclass(frozen=True)
class Lessons:
    """latents [1 + treatments, drawings, 16, 8, 8], scaled; row 0 is untreated."""

    latents: Tensor
    names: list[str]
    styles: list[str]
    treatments: list[str]

    def caption(self, form: str, treatment: int, drawing: int) -> str:
        return form.format(
            name=self.names[drawing],
            style=self.styles[drawing],
            treatment=self.treatments[treatment - 1] if treatment else "",
        )

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, list[str]]:
        """Clean latents [batch, 16, 8, 8] and their captions; no drawing twice."""
        drawings = torch.randperm(self.latents.shape[1], generator=generator)[:batch]
        treatments = torch.randint(1, self.latents.shape[0], (batch,), generator=generator)
        treatments[torch.rand(batch, generator=generator) >= TREATED_SHARE] = 0
        captions = [
            self.caption(_form(bool(treatment), float(chance)), int(treatment), int(drawing))
            for drawing, treatment, chance in zip(
                drawings, treatments, torch.rand(batch, generator=generator), strict=True
            )
        ]
        return self.latents[treatments, drawings], captions


def _form(treated: bool, chance: float) -> str:
    forms = TREATED_FORMS if treated else PLAIN_FORMS
    for form, share in forms.items():
        chance -= share
        if chance < 0:
            return form
    return ""


def knowledge() -> Knowledge:
    """What the next training teaches."""
    return read_knowledge(LESSONS_FILE)


def captions_of(wanted: Knowledge) -> list[str]:
    """Every caption with words of style or treatment, once: what tokenizers are trained on."""
    words = ["", *wanted.treatments]
    return [
        ", ".join(part for part in (name, style, treatment) if part)
        for name in wanted.concepts
        for style in wanted.styles.values()
        for treatment in words
    ]


def load_lessons(data: Path, basis: PatchBasis, treatments: Sequence[str]) -> Lessons:
    wanted = knowledge()
    taught = load_drawings(data, wanted.styles, wanted.concepts)
    around = ground(taught.images.float() / 255)
    versions = [taught.images, *(treat(name, taught.images, around) for name in treatments)]
    latents = torch.stack([basis.latents(images.float() / 127.5 - 1) for images in versions])
    styles = [caption.rpartition(", ")[2] for caption in taught.captions]
    return Lessons(latents, taught.names, styles, list(treatments))
