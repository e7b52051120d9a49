"""Stable Diffusion XL and its many fine-tunes.

CLIP-L and OpenCLIP-G give 77 tokens side by side, the second the pooled prompt as well. The size of
the picture is an input. An empty prompt is all zeros where model_index.json says so.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qzo_diffusion.diffusion.encoded_prompt import pooled_arguments
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
from qzo_diffusion.diffusion.families.unet_models import SDXL_MODELS
from qzo_diffusion.diffusion.objectives import ddpm_of
from qzo_diffusion.diffusion.text_encoders import clip_states, longest

CLIP_L, CLIP_G = "text_encoder", "text_encoder_2"
REDUCTION = 8  # pixels along a side of one latent, of every VAE of this family


def call(
    denoiser: Any,
    noisy: Tensor,
    time: Tensor,
    prompts: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    guidance: float | None = None,
) -> Tensor:
    height, width = (REDUCTION * side for side in noisy.shape[-2:])
    # the picture's own size, where it was cut (nowhere), and the wanted size
    sizes = torch.tensor([height, width, 0, 0, height, width], dtype=dtype, device=noisy.device)
    prediction: Tensor = denoiser(
        noisy.to(dtype),
        time,
        encoder_hidden_states=prompts[0].to(dtype),
        added_cond_kwargs={
            "text_embeds": prompts[1].to(dtype),
            "time_ids": sizes.expand(len(noisy), -1),
        },
        return_dict=False,
    )[0]
    return prediction.float()


def encode(encoders: Encoders, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
    states = [
        encoders.run(part, lambda encoder, own: clip_states(encoder, own, prompts))
        for part in (CLIP_L, CLIP_G)
    ]
    tokenizer = encoders.tokenizer(CLIP_L)
    limits = [(tokenizer, tokenizer.model_max_length)]
    found = [
        {
            "embeds": torch.cat([of_l[0], of_g[0]], dim=-1),
            "pooled": of_g[1],
            "tokens": longest(prompt, limits),
        }
        for prompt, of_l, of_g in zip(prompts, *states, strict=True)
    ]
    if encoders.setting("force_zeros_for_empty_prompt", True):
        for prompt, tensors in zip(prompts, found, strict=True):
            if not prompt:
                tensors |= {name: tensors[name].zero_() for name in ("embeds", "pooled")}
    return found


def widths(denoiser: Config, encoders: Mapping[str, Config]) -> list[tuple[str, Any, Any]]:
    hidden = sum(encoders[part].get("hidden_size", 512) for part in (CLIP_L, CLIP_G))
    pooled = encoders[CLIP_G].get("projection_dim", 512) + 6 * denoiser["addition_time_embed_dim"]
    return [
        ("prompts", hidden, unet.shape(denoiser).text_width),
        ("pooled prompts and sizes", pooled, denoiser["projection_class_embeddings_input_dim"]),
    ]


def pipeline(denoiser: Any, scheduler: Any, vae: Any) -> Any:
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline(
        vae, None, None, None, None, denoiser, scheduler, add_watermarker=False
    )


SDXL = Family(
    name="sdxl",
    title="Stable Diffusion XL",
    denoiser=Denoiser(
        part="unet",
        class_name=unet.CLASS,
        owns=lambda config: config.get("addition_embed_type") == "text_time",
        skip=unet.SKIP,
        token_wise=(),
        sample_size=128,
        shape=unet.shape,
        call=call,
        level=unet.level,
    ),
    texts=Texts(
        classes={CLIP_L: "CLIPTextModel", CLIP_G: "CLIPTextModelWithProjection"},
        encode=encode,
        widths=widths,
    ),
    sampling=Sampling(
        pipelines=("StableDiffusionXLPipeline",),
        schedulers=unet.SCHEDULERS,
        steps=30,
        guidance=5.0,
        pipeline=pipeline,
        arguments=pooled_arguments,
        shift=unet.no_shift,
        set_times=unet.set_times,
    ),
    vae_factors=("scaling_factor",),
    objective=ddpm_of,
    hub=Hub(
        ids=r"sdxl|stable-diffusion-xl|playground-v2|\bpony|illustrious",
        twice=("sd_xl_*.safetensors", "*.fp16.safetensors", "*.bin", "*.onnx*", "*.msgpack"),
        nbytes=14e9,
    ),
    architecture=lambda config: "stable-diffusion-xl-v1-base",
    source="https://github.com/Stability-AI/generative-models",
    gguf=("sdxl",),
    published=SDXL_MODELS,
)
