"""Stable Diffusion 3 and 3.5.

Prompt embeddings are exactly those of diffusers' pipeline. 77 tokens of CLIP-L and OpenCLIP-G stand
side by side (the last but one hidden state), padded with zeros to T5's width. T5's tokens follow,
or zeros without T5.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qzo_diffusion.diffusion.encoded_prompt import pooled_arguments
from qzo_diffusion.diffusion.families.family import (
    Config,
    Denoiser,
    Encoders,
    Family,
    Hub,
    Sampling,
    Shape,
    Texts,
)
from qzo_diffusion.diffusion.families.sd3_layout import SD3_LAYOUT
from qzo_diffusion.diffusion.families.sd3_models import PUBLISHED
from qzo_diffusion.diffusion.families.shift import flow_shift, shift_options
from qzo_diffusion.diffusion.families.t5 import encode_t5
from qzo_diffusion.diffusion.objectives import FLOW, TIMES
from qzo_diffusion.diffusion.text_encoders import clip_states, longest

CLIP_L, CLIP_G, T5 = "text_encoder", "text_encoder_2", "text_encoder_3"
T5_TOKENS = 256
T5_WIDTH = 4096
# (width, layers) -> the name in modelspec's list of architectures
ARCHITECTURES = {
    (2432, 38): "stable-diffusion-3-5-large",
    (1536, 24): "stable-diffusion-3-5-medium",
}


def call(
    denoiser: Any,
    noisy: Tensor,
    time: Tensor,
    prompts: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    guidance: float | None = None,
) -> Tensor:
    velocity: Tensor = denoiser(
        hidden_states=noisy.to(dtype),
        timestep=time,
        encoder_hidden_states=prompts[0].to(dtype),
        pooled_projections=prompts[1].to(dtype),
        return_dict=False,
    )[0]
    return velocity.float()


def set_times(scheduler: Any, steps: int, tokens: int, device: torch.device) -> None:
    scheduler.set_timesteps(steps, device=device, **shift_options(scheduler, tokens))


def encode(encoders: Encoders, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
    clip_l, clip_g = (
        encoders.run(part, lambda encoder, tokenizer: clip_states(encoder, tokenizer, prompts))
        for part in (CLIP_L, CLIP_G)
    )
    clip_tokenizer = encoders.tokenizer(CLIP_L)
    limits = [(clip_tokenizer, clip_tokenizer.model_max_length)]
    if encoders.t5 == "none":
        length = encoders.t5_tokens or T5_TOKENS
        width = encoders.width(((T5, "d_model"), ("transformer", "joint_attention_dim")), T5_WIDTH)
        t5 = [torch.zeros(length, width, dtype=encoders.dtype)] * len(prompts)
    else:
        t5, limit = encode_t5(encoders, T5, prompts, T5_TOKENS)
        limits.append(limit)
    return [
        {
            "embeds": put_together(of_l[0], of_g[0], of_t5),
            "pooled": torch.cat([of_l[1], of_g[1]]),
            "tokens": longest(prompt, limits),
        }
        for prompt, of_l, of_g, of_t5 in zip(prompts, clip_l, clip_g, t5, strict=True)
    ]


def put_together(clip_l: Tensor, clip_g: Tensor, t5: Tensor) -> Tensor:
    """Join [77, 768], [77, 1280] and [T, 4096] to prompt_embeds [77 + T, 4096]."""
    clip = torch.cat([clip_l, clip_g], dim=-1)
    return torch.cat([F.pad(clip, (0, t5.shape[-1] - clip.shape[-1])), t5])


def widths(denoiser: Config, encoders: Mapping[str, Config]) -> list[tuple[str, Any, Any]]:
    pooled = sum(encoders[part].get("projection_dim", 512) for part in (CLIP_L, CLIP_G))
    pairs = [("pooled prompts", pooled, denoiser["pooled_projection_dim"])]
    if T5 in encoders:
        width = encoders[T5].get("d_model", 512)
        pairs.append(("prompts", width, denoiser["joint_attention_dim"]))
    return pairs


def shape(config: Config) -> Shape:
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return Shape(width, config["patch_size"], config["joint_attention_dim"], config["in_channels"])


def pipeline(denoiser: Any, scheduler: Any, vae: Any) -> Any:
    from diffusers import StableDiffusion3Pipeline

    return StableDiffusion3Pipeline(denoiser, scheduler, vae, None, None, None, None, None, None)


def architecture(config: Config) -> str:
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return ARCHITECTURES.get((width, config["num_layers"]), "stable-diffusion-3")


SD3 = Family(
    name="sd3",
    title="Stable Diffusion 3 and 3.5",
    denoiser=Denoiser(
        part="transformer",
        class_name="SD3Transformer2DModel",
        # 0.5 % of the weights, and the ones that hurt when quantized
        skip=("pos_embed", "time_text_embed", "context_embedder", "norm_out", "proj_out"),
        token_wise=("attn.to_q", "attn.to_out", "attn2.to_q", "attn2.to_out", "ff.net"),
        sample_size=128,
        shape=shape,
        call=call,
        level=lambda options: float(options["timestep"].flatten()[0]) / TIMES,
        layout=SD3_LAYOUT,
    ),
    texts=Texts(
        classes={
            CLIP_L: "CLIPTextModelWithProjection",
            CLIP_G: "CLIPTextModelWithProjection",
            T5: "T5EncoderModel",
        },
        encode=encode,
        widths=widths,
        large=T5,
        large_optional=True,
        large_tokens=T5_TOKENS,
    ),
    sampling=Sampling(
        pipelines=("StableDiffusion3Pipeline",),
        schedulers=("FlowMatchEulerDiscreteScheduler",),
        steps=28,
        guidance=4.5,
        pipeline=pipeline,
        arguments=pooled_arguments,
        shift=flow_shift,
        set_times=set_times,
    ),
    vae_factors=("scaling_factor", "shift_factor"),
    objective=lambda scheduler: FLOW,
    hub=Hub(
        ids=r"stable-diffusion-3|\bsd3",
        gated=("stabilityai/stable-diffusion-3",),
        # a single file for other programs, and encoders for it
        twice=("sd3*.safetensors", "text_encoders/*"),
    ),
    architecture=architecture,
    source="https://github.com/Stability-AI/sd3.5",
    gguf=("sd3",),
    gguf_kept=(
        *("final_layer.", "context_embedder.", "pos_embed"),
        *("t_embedder.", "y_embedder.", "x_embedder."),
    ),
    published=PUBLISHED,
)
