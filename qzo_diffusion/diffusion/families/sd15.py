"""Stable Diffusion 1.5 and 2.1: the last hidden state of one CLIP encoder, and no pooled prompt."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qzo_diffusion.diffusion.encoded_prompt import plain_arguments
from qzo_diffusion.diffusion.families import unet
from qzo_diffusion.diffusion.families.family import (
    Config,
    Denoiser,
    Encoders,
    Family,
    Hub,
    Sampling,
    Texts,
)
from qzo_diffusion.diffusion.families.unet_models import SD15_MODELS
from qzo_diffusion.diffusion.objectives import ddpm_of
from qzo_diffusion.diffusion.text_encoders import clip_last, longest

CLIP = "text_encoder"


def call(
    denoiser: Any,
    noisy: Tensor,
    time: Tensor,
    prompts: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    guidance: float | None = None,
) -> Tensor:
    prediction: Tensor = denoiser(
        noisy.to(dtype), time, encoder_hidden_states=prompts[0].to(dtype), return_dict=False
    )[0]
    return prediction.float()


def encode(encoders: Encoders, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
    states = encoders.run(CLIP, lambda encoder, own: clip_last(encoder, own, prompts))
    tokenizer = encoders.tokenizer(CLIP)
    limits = [(tokenizer, tokenizer.model_max_length)]
    return [
        {"embeds": state, "pooled": state.new_zeros(0), "tokens": longest(prompt, limits)}
        for prompt, state in zip(prompts, states, strict=True)
    ]


def widths(denoiser: Config, encoders: Mapping[str, Config]) -> list[tuple[str, Any, Any]]:
    hidden = encoders[CLIP].get("hidden_size", 512)
    return [("prompts", hidden, unet.shape(denoiser).text_width)]


def pipeline(denoiser: Any, scheduler: Any, vae: Any) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae, None, None, denoiser, scheduler, None, None, requires_safety_checker=False
    )


def architecture(config: Config) -> str:
    wide = unet.shape(config).text_width == 1024
    return "stable-diffusion-v2-768-v" if wide else "stable-diffusion-v1"


SD15 = Family(
    name="sd15",
    title="Stable Diffusion 1.5 and 2.1",
    denoiser=Denoiser(
        part="unet",
        class_name=unet.CLASS,
        owns=lambda config: config.get("addition_embed_type") is None,
        skip=unet.SKIP,
        token_wise=(),
        sample_size=64,
        shape=unet.shape,
        call=call,
        level=unet.level,
    ),
    texts=Texts(classes={CLIP: "CLIPTextModel"}, encode=encode, widths=widths),
    sampling=Sampling(
        pipelines=("StableDiffusionPipeline",),
        schedulers=(unet.SCHEDULERS[1], unet.SCHEDULERS[0], *unet.SCHEDULERS[2:]),
        steps=30,
        guidance=7.5,
        pipeline=pipeline,
        arguments=plain_arguments,
        shift=unet.no_shift,
        set_times=unet.set_times,
    ),
    vae_factors=("scaling_factor",),
    objective=ddpm_of,
    hub=Hub(
        ids=r"stable-diffusion-(v?1|v?2)|\bsd-?(v?1|v?2|turbo)\b|dreamshaper",
        twice=(
            "v1-5-*",
            "v2-1_*",
            "*.fp16.safetensors",
            "*.non_ema.*",
            "*.bin",
            "safety_checker/*",
        ),
        nbytes=6e9,
    ),
    architecture=architecture,
    source="https://github.com/CompVis/stable-diffusion",
    gguf=("sd1", "sd2"),
    published=SD15_MODELS,
)
