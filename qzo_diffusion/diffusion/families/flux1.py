"""FLUX.1: dev, which takes guidance as an input, and schnell, which is distilled to few steps.

The transformer takes latents in squares of 2x2 as one token of 64 numbers, with the place of each
token, and sigma itself as time. CLIP-L gives the pooled prompt, T5 the tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qzo_diffusion.diffusion.encoded_prompt import EncodedPrompt, stack_prompts
from qzo_diffusion.diffusion.families.family import (
    Config,
    Denoiser,
    Encoders,
    Family,
    Hub,
    Sampling,
    Texts,
)
from qzo_diffusion.diffusion.families.flux1_layout import FLUX1_LAYOUT
from qzo_diffusion.diffusion.families.flux1_models import PUBLISHED
from qzo_diffusion.diffusion.families.packing import (
    drawn,
    packed,
    rows_and_columns,
    shape_of_squares,
    unpacked,
)
from qzo_diffusion.diffusion.families.shift import flow_shift, set_even_times
from qzo_diffusion.diffusion.families.t5 import encode_t5
from qzo_diffusion.diffusion.objectives import FLOW, TIMES
from qzo_diffusion.diffusion.text_encoders import clip_pooled, longest

CLIP, T5 = "text_encoder", "text_encoder_2"
T5_TOKENS = 512
TRAINED_GUIDANCE = 1.0  # diffusers' scripts train with it; pictures are drawn with 3.5


def places(rows: int, columns: int) -> Tensor:
    """Return the place (0, row, column) of each token, [rows · columns, 3]."""
    return torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns))


def call(
    denoiser: Any,
    noisy: Tensor,
    time: Tensor,
    prompts: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    guidance: float | None = None,
) -> Tensor:
    noisy, embeds = noisy.to(dtype), prompts[0].to(dtype)
    rows, columns = rows_and_columns(noisy)
    given = None
    if denoiser.config.guidance_embeds:
        value = TRAINED_GUIDANCE if guidance is None else guidance
        given = torch.full((len(noisy),), value, device=noisy.device)
    velocity = denoiser(
        hidden_states=packed(noisy),
        timestep=time.to(dtype) / TIMES,  # rounded as the pipeline rounds it
        guidance=given,
        pooled_projections=prompts[1].to(dtype),
        encoder_hidden_states=embeds,
        txt_ids=embeds.new_zeros(embeds.shape[1], 3),
        img_ids=places(rows, columns).to(noisy),
        return_dict=False,
    )[0]
    return unpacked(velocity, rows, columns).float()


def encode(encoders: Encoders, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
    pooled = encoders.run(CLIP, lambda encoder, own: clip_pooled(encoder, own, prompts))
    # CLIP's tokenizer may cut a prompt: its pooled state is a summary, and T5 reads the whole
    t5, limit = encode_t5(encoders, T5, prompts, T5_TOKENS)
    return [
        {"embeds": of_t5, "pooled": of_clip, "tokens": longest(prompt, [limit])}
        for prompt, of_clip, of_t5 in zip(prompts, pooled, t5, strict=True)
    ]


def widths(denoiser: Config, encoders: Mapping[str, Config]) -> list[tuple[str, Any, Any]]:
    return [
        (
            "pooled prompts",
            encoders[CLIP].get("hidden_size", 512),
            denoiser["pooled_projection_dim"],
        ),
        ("prompts", encoders[T5].get("d_model", 512), denoiser["joint_attention_dim"]),
    ]


def pipeline(denoiser: Any, scheduler: Any, vae: Any) -> Any:
    from diffusers import FluxPipeline

    return FluxPipeline(scheduler, vae, None, None, None, None, denoiser)


def arguments(
    prompts: Sequence[EncodedPrompt], negatives: Sequence[EncodedPrompt]
) -> dict[str, Any]:
    """Guidance is an input of the model, so negatives have no place."""
    embeds, pooled = stack_prompts(prompts)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


FLUX1 = Family(
    name="flux1",
    title="FLUX.1",
    denoiser=Denoiser(
        part="transformer",
        class_name="FluxTransformer2DModel",
        # proj_out is quantized: diffusers would leave those of single blocks out as well
        skip=("time_text_embed", "context_embedder", "x_embedder", "norm_out"),
        token_wise=("attn.to_q", "attn.to_out", "ff.net"),
        joint=("single_transformer_blocks.",),
        sample_size=128,
        shape=shape_of_squares,
        call=call,
        level=lambda options: float(options["timestep"].flatten()[0]),
        layout=FLUX1_LAYOUT,
    ),
    texts=Texts(
        classes={CLIP: "CLIPTextModel", T5: "T5EncoderModel"},
        encode=encode,
        widths=widths,
        clip_tokens=0,
        large=T5,
        large_tokens=T5_TOKENS,
    ),
    sampling=Sampling(
        pipelines=("FluxPipeline",),
        schedulers=("FlowMatchEulerDiscreteScheduler",),
        steps=28,
        guidance=3.5,
        pipeline=pipeline,
        arguments=arguments,
        shift=flow_shift,
        set_times=set_even_times,
        unpacked=drawn,
        twice=False,
    ),
    vae_factors=("scaling_factor", "shift_factor"),
    objective=lambda scheduler: FLOW,
    hub=Hub(
        ids=r"flux\.?-?1",
        gated=("black-forest-labs/FLUX.1-dev",),
        twice=("flux1-*.safetensors", "ae.safetensors"),
        nbytes=34e9,
    ),
    architecture=lambda config: "flux-1-dev" if config.get("guidance_embeds") else "flux-1-schnell",
    source="https://github.com/black-forest-labs/flux",
    gguf=("flux",),
    gguf_kept=("txt_in.", "img_in.", "time_in.", "vector_in.", "guidance_in.", "final_layer."),
    published=PUBLISHED,
    distilled=lambda denoiser, index: not denoiser.get("guidance_embeds"),
)
