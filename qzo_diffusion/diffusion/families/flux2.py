"""FLUX.2 klein, 4B and 9B: base, and distilled to four steps.

The transformer takes latents in squares of 2x2, the place of each token in four columns (time, row,
column, text), and sigma itself as time. All blocks of a kind share one modulation: a change of its
weights would touch all of them at once, so it stays as it is (docs/decisions/models_and_scores.md
D85). Blocks of one stream have q, k, v and the feed-forward in one layer.

Three hidden states of Qwen3 side by side give 512 tokens; those of padding are read as well.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qzo_diffusion.diffusion.autoencoders import kind_of_model
from qzo_diffusion.diffusion.encoded_prompt import plain_arguments
from qzo_diffusion.diffusion.families.family import (
    Config,
    Denoiser,
    Encoders,
    Family,
    Hub,
    Sampling,
    Texts,
    large_tokenizer,
)
from qzo_diffusion.diffusion.families.flux2_layout import FLUX2_LAYOUT
from qzo_diffusion.diffusion.families.flux2_models import PUBLISHED
from qzo_diffusion.diffusion.families.packing import (
    packed,
    rows_and_columns,
    shape_of_squares,
    unpacked,
)
from qzo_diffusion.diffusion.language_model import LanguageModel, chat_text, language_states
from qzo_diffusion.diffusion.objectives import FLOW, TIMES
from qzo_diffusion.diffusion.text_encoders import longest

QWEN, STATES = "text_encoder", (9, 18, 27)
TOKENS = 512
STEPS = 50


def places(rows: int, columns: int, texts: int) -> Tensor:
    """Return the place of each token, [rows · columns · texts, 4]."""
    sides = (1, rows, columns, texts)
    return torch.cartesian_prod(*(torch.arange(side) for side in sides))


def call(
    denoiser: Any,
    noisy: Tensor,
    time: Tensor,
    prompts: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    guidance: float | None = None,
) -> Tensor:
    noisy, embeds = noisy.to(dtype), prompts[0].to(dtype)
    count, rows, columns = len(noisy), *rows_and_columns(noisy)
    of_image, of_text = places(rows, columns, 1), places(1, 1, embeds.shape[1])
    velocity = denoiser(
        hidden_states=packed(noisy),
        timestep=time.to(dtype) / TIMES,  # rounded as the pipeline rounds it
        guidance=None,
        encoder_hidden_states=embeds,
        txt_ids=of_text.to(noisy.device).expand(count, -1, -1),
        img_ids=of_image.to(noisy.device).expand(count, -1, -1),
        return_dict=False,
    )[0]
    return unpacked(velocity, rows, columns).float()


def log_shift(tokens: int, steps: int) -> float:
    """Return the logarithm of the time shift, which the pipeline's authors fitted to lines through
    numbers of tokens, for 10 and for 200 steps.
    """
    of_10, of_200 = 8.73809524e-05 * tokens + 1.89833333, 0.00016927 * tokens + 0.45666666
    return of_200 if tokens > 4300 else of_200 + (of_10 - of_200) * (200 - steps) / 190


def set_times(scheduler: Any, steps: int, tokens: int, device: torch.device) -> None:
    sigmas = [1 - step / steps for step in range(steps)]
    scheduler.set_timesteps(sigmas=sigmas, device=device, mu=log_shift(tokens, steps))


def shift(scheduler: Any, tokens: int) -> float:
    """Return the shift of the default number of steps."""
    if not scheduler.config.get("use_dynamic_shifting"):
        return float(scheduler.config["shift"])
    return math.exp(log_shift(tokens, STEPS))


def encode(encoders: Encoders, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
    tokenizer, length = large_tokenizer(encoders, QWEN, TOKENS)
    texts = [chat_text(tokenizer, prompt, enable_thinking=False) for prompt in prompts]
    states = encoders.run(
        QWEN, lambda encoder, own: language_states(encoder, own, texts, length, padded=True)
    )
    return [
        {
            "embeds": of_text.transpose(0, 1).flatten(1),  # [S, T, D] -> [T, S · D]
            "pooled": of_text.new_zeros(0),
            "tokens": longest(text, [(tokenizer, length)]),
        }
        for text, of_text in zip(texts, states, strict=True)
    ]


def widths(denoiser: Config, encoders: Mapping[str, Config]) -> list[tuple[str, Any, Any]]:
    given = len(STATES) * encoders[QWEN].get("hidden_size", 4096)
    return [("prompts", given, denoiser["joint_attention_dim"])]


def pipeline(denoiser: Any, scheduler: Any, vae: Any) -> Any:
    from diffusers import Flux2KleinPipeline

    return Flux2KleinPipeline(scheduler, vae, None, None, denoiser)


def drawn(pipeline: Any, latents: Tensor, height: int, width: int) -> Tensor:
    """The pipeline gives the VAE's own numbers; scale them as in training."""
    return kind_of_model(pipeline.vae).latents(pipeline.vae, latents.float())


FLUX2 = Family(
    name="flux2",
    title="FLUX.2 klein",
    denoiser=Denoiser(
        part="transformer",
        class_name="Flux2Transformer2DModel",
        skip=(
            *("time_guidance_embed", "double_stream_modulation_img"),
            *("double_stream_modulation_txt", "single_stream_modulation"),
            *("x_embedder", "context_embedder", "norm_out", "proj_out"),
        ),
        token_wise=("attn.to_q", "attn.to_out", "ff.linear_in", "ff.linear_out"),
        joint=("single_transformer_blocks.",),
        sample_size=128,
        shape=shape_of_squares,
        call=call,
        level=lambda options: float(options["timestep"].flatten()[0]),
        layout=FLUX2_LAYOUT,
    ),
    texts=Texts(
        classes={QWEN: LanguageModel("Qwen3Model", STATES)},
        encode=encode,
        widths=widths,
        clip_tokens=0,
        large=QWEN,
        large_tokens=TOKENS,
    ),
    sampling=Sampling(
        pipelines=("Flux2KleinPipeline",),
        schedulers=("FlowMatchEulerDiscreteScheduler",),
        steps=STEPS,
        guidance=4.0,
        pipeline=pipeline,
        arguments=plain_arguments,
        shift=shift,
        set_times=set_times,
        unpacked=drawn,
        of_distilled=(4, 1.0),
    ),
    vae="AutoencoderKLFlux2",
    vae_factors=("batch_norm_eps",),
    objective=lambda scheduler: FLOW,
    hub=Hub(
        ids=r"flux[.-]?2[._-]?klein",
        gated=("black-forest-labs/FLUX.2-klein-9B", "black-forest-labs/FLUX.2-klein-base-9B"),
        twice=("flux-2-klein-*.safetensors",),
        nbytes=36e9,
    ),
    architecture=lambda config: "flux-2-klein",
    source="https://github.com/black-forest-labs/flux2",
    gguf=("flux", "flux2"),  # ComfyUI-GGUF knows the first
    gguf_kept=(
        "txt_in.",
        "img_in.",
        "time_in.",
        "double_stream_",
        "single_stream_",
        "final_layer.",
    ),
    published=PUBLISHED,
    distilled=lambda denoiser, index: bool(index.get("is_distilled")),
)
