"""Stage two: the transformer and its three text encoders, trained together by the flow-matching
loss on the taught drawings and treatments.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.tiny.adopt import adopt_
from benchmarks.tiny.lessons import Lessons, captions_of, knowledge, load_lessons
from benchmarks.tiny.look import Look
from benchmarks.tiny.patches import fit_basis
from benchmarks.tiny.pipeline import TextToVelocity
from benchmarks.tiny.ranks import Ranks
from benchmarks.tiny.training import Recipe, bf16_is_faster, fast_cpu, train_resumable

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


def build_model(seed: int = 0, begin_from: Path | None = None) -> TextToVelocity:
    """A new model, or one that begins with the weights of a pipeline folder."""
    torch.manual_seed(seed)
    model = TextToVelocity(captions_of(knowledge()))
    initialise(model)
    if begin_from is not None:
        adopt_(model, begin_from)
    return model


def velocity_loss(
    model: TextToVelocity, lessons: Lessons, batch: int, generator: torch.Generator, bf16: bool
) -> Tensor:
    clean, captions = lessons.draw(batch, generator)
    noise = torch.randn(clean.shape, generator=generator)
    sigma = draw_sigma(batch, generator)
    at = sigma.view(-1, 1, 1, 1)
    with fast_cpu(bf16):
        velocity = model((1 - at) * clean + at * noise, sigma, *model.tokenize(captions))
    return F.mse_loss(velocity.float(), noise - clean)


def train_denoiser(
    data: Path,
    work: Path,
    recipe: Recipe,
    *,
    batch: int,
    compiled: bool,
    begin_from: Path | None,
    ranks: Ranks,
) -> TextToVelocity:
    """`batch` drawings a step on every rank."""
    model, basis = build_model(recipe.seed, begin_from), fit_basis(data)
    lessons = load_lessons(data, basis, knowledge().treatments)
    trial = torch.Generator().manual_seed(0)
    bf16 = bf16_is_faster(lambda bf16: velocity_loss(model, lessons, batch, trial, bf16))
    if compiled:  # a sixth faster, after a minute of compiling
        for block in model.transformer.transformer_blocks:
            block.compile(dynamic=False)

    def loss_of_step(_step: int, generator: torch.Generator) -> Tensor:
        return velocity_loss(model, lessons, batch, generator, bf16)

    train_resumable(
        model,
        loss_of_step,
        recipe,
        checkpoint=work / "denoiser.safetensors",
        watch=Look(model, lessons, basis, work),
        ranks=ranks,
    )
    return model
