"""Stage two: the transformer and its three text encoders, trained together by the flow-matching
loss on the taught drawings.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.tiny.drawings import load_drawings, taught_concepts, taught_styles
from benchmarks.tiny.pipeline import TextToVelocity
from benchmarks.tiny.train_vae import fit_basis
from benchmarks.tiny.training import fast_cpu, train_resumable

# How often each form of a caption is read; the empty one teaches the unconditional branch of
# guidance.
CAPTION_FORMS = {
    "{name}, {style}": 0.70,
    "{name}": 0.10,
    "a drawing of {name}, {style}": 0.10,
    "": 0.10,
}
# high noise decides which drawing it becomes, so it gets most of the steps
SIGMA_LOGIT_MEAN, SIGMA_LOGIT_STD = 0.5, 1.2


def initialise(model: TextToVelocity) -> None:
    """DiT's start: every block begins as the identity.

    CLIP's embeddings start at the scale of T5's, or nobody listens to them.
    """
    for block in model.transformer.transformer_blocks:
        for linear in (block.norm1.linear, block.norm1_context.linear):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
    nn.init.zeros_(model.transformer.norm_out.linear.weight)
    nn.init.zeros_(model.transformer.norm_out.linear.bias)
    nn.init.zeros_(model.transformer.proj_out.weight)
    nn.init.zeros_(model.transformer.proj_out.bias)
    for encoder in (model.text_encoder, model.text_encoder_2):
        nn.init.normal_(encoder.text_model.embeddings.token_embedding.weight, std=0.5)
        nn.init.normal_(encoder.text_model.embeddings.position_embedding.weight, std=0.2)


def spread_uniform(count: int, generator: torch.Generator) -> Tensor:
    """One uniform number in each of `count` equal slices of [0, 1): less noise in the loss than
    free draws.
    """
    return (torch.arange(count) + torch.rand(count, generator=generator)) / count


def draw_sigma(count: int, generator: torch.Generator) -> Tensor:
    """Three quarters logit-normal, one quarter uniform, so that the ends are seen too."""
    uniform = spread_uniform(count, generator)
    normal = torch.special.ndtri(uniform.clamp(1e-4, 1 - 1e-4))
    bell = torch.sigmoid(SIGMA_LOGIT_MEAN + SIGMA_LOGIT_STD * normal)
    flat = torch.rand(count, generator=generator) < 0.25
    return torch.where(flat, uniform, bell).clamp(1e-3, 1.0)


def caption_ids(
    model: TextToVelocity, names: Sequence[str], styles: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Ids of every form of every caption: two tensors [forms, N, PROMPT_TOKENS]."""
    clip, t5 = [], []
    for form in CAPTION_FORMS:
        prompts = [
            form.format(name=name, style=style) for name, style in zip(names, styles, strict=True)
        ]
        clip_ids, t5_ids = model.tokenize(prompts)
        clip.append(clip_ids)
        t5.append(t5_ids)
    return torch.stack(clip), torch.stack(t5)


def build_model(data: Path, seed: int = 0) -> TextToVelocity:
    torch.manual_seed(seed)
    model = TextToVelocity(data)
    initialise(model)
    return model


def train_denoiser(
    data: Path,
    work: Path,
    *,
    steps: int,
    batch: int = 32,
    peak_lr: float = 2e-3,
    compiled: bool = False,
    seed: int = 0,
) -> TextToVelocity:
    model = build_model(data, seed)
    if compiled:  # a fifth faster, after some minutes of compiling
        for block in model.transformer.transformer_blocks:
            block.compile(dynamic=False)
    taught = load_drawings(data, taught_styles(), taught_concepts())
    basis = fit_basis(load_drawings(data, taught_styles()).images)
    latents = basis.latents(taught.images.float() / 127.5 - 1)
    styles = [
        caption.removeprefix(f"{name}, ")
        for name, caption in zip(taught.names, taught.captions, strict=True)
    ]
    clip_ids, t5_ids = caption_ids(model, taught.names, styles)
    form_weights = torch.tensor(list(CAPTION_FORMS.values()))

    def loss_of_step(step: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randperm(len(latents), generator=generator)[:batch]
        forms = torch.multinomial(form_weights, batch, replacement=True, generator=generator)
        clean = latents[chosen]
        noise = torch.randn(clean.shape, generator=generator)
        sigma = draw_sigma(batch, generator)
        at = sigma.view(-1, 1, 1, 1)
        with fast_cpu():
            velocity = model(
                (1 - at) * clean + at * noise, sigma, clip_ids[forms, chosen], t5_ids[forms, chosen]
            )
        return F.mse_loss(velocity.float(), noise - clean)

    checkpoint = work / "denoiser.safetensors"
    train_resumable(
        model,
        loss_of_step,
        checkpoint=checkpoint,
        total_steps=steps,
        peak_lr=peak_lr,
        ema_decay=0.999,
        seed=seed,
    )
    return model
