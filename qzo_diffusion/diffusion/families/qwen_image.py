"""Qwen-Image, 20 B.

The transformer takes latents in squares of 2x2, the shape of the picture in tokens, and sigma
itself as time. The VAE is one of videos; a picture is a video of one frame. The last hidden state
of Qwen2.5-VL gives as many tokens as a prompt has, after those of a fixed instruction. In a batch,
shorter prompts end in zeros, which a mask hides.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
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
    large_tokenizer,
)
from qzo_diffusion.diffusion.families.packing import (
    SIDE,
    drawn,
    packed,
    rows_and_columns,
    shape_of_squares,
    unpacked,
)
from qzo_diffusion.diffusion.families.qwen_image_layout import QWEN_IMAGE_LAYOUT
from qzo_diffusion.diffusion.families.qwen_image_models import PUBLISHED
from qzo_diffusion.diffusion.families.shift import flow_shift, set_even_times
from qzo_diffusion.diffusion.language_model import LanguageModel, language_states, text_config
from qzo_diffusion.diffusion.objectives import FLOW, TIMES

QWEN = "text_encoder"
TOKENS = 1024
# the words that the model was trained with
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity,"
    " text, spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}"
    "<|im_end|>\n<|im_start|>assistant\n"
)
INSTRUCTION = 34  # tokens of the template that are dropped


def mask_of(counts: Tensor, length: int) -> Tensor:
    """Return which of `length` tokens are no padding [B, length], from counts [B, 1]."""
    return torch.arange(length, device=counts.device) < counts


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
    mask = None if noisy.is_meta else mask_of(prompts[1], embeds.shape[1])
    velocity = denoiser(
        hidden_states=packed(noisy),
        timestep=time.to(dtype) / TIMES,  # rounded as the pipeline rounds it
        guidance=None,
        # attention is faster without a mask, and other kernels round otherwise
        encoder_hidden_states_mask=None if mask is None or mask.all() else mask,
        encoder_hidden_states=embeds,
        img_shapes=[[(1, rows, columns)]] * len(noisy),
        return_dict=False,
    )[0]
    return unpacked(velocity, rows, columns).float()


def fill_positions(model: Any) -> None:
    """Compute the tables of positions, which no file holds and which are no buffers."""
    own = model.pos_embed
    model.pos_embed = type(own)(own.theta, own.axes_dim, own.scale_rope)


def encode(encoders: Encoders, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
    tokenizer, length = large_tokenizer(encoders, QWEN, TOKENS)
    texts = [TEMPLATE.format(prompt) for prompt in prompts]
    states = encoders.run(
        QWEN, lambda encoder, own: language_states(encoder, own, texts, length + INSTRUCTION)
    )
    found = []
    for text, (of_text,) in zip(texts, states, strict=True):
        embeds, count = of_text[INSTRUCTION:], len(tokenizer(text).input_ids) - INSTRUCTION
        tokens = torch.tensor([count, length])
        found.append({"embeds": embeds, "pooled": torch.tensor([len(embeds)]), "tokens": tokens})
    return found


def widths(denoiser: Config, encoders: Mapping[str, Config]) -> list[tuple[str, Any, Any]]:
    given = text_config(encoders[QWEN]).get("hidden_size", 8192)
    return [("prompts", given, denoiser["joint_attention_dim"])]


def pipeline(denoiser: Any, scheduler: Any, vae: Any) -> Any:
    from diffusers import QwenImagePipeline

    return QwenImagePipeline(scheduler, vae, None, None, denoiser)


def arguments(
    prompts: Sequence[EncodedPrompt], negatives: Sequence[EncodedPrompt]
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, some in (("prompt_embeds", prompts), ("negative_prompt_embeds", negatives)):
        embeds, counts = stack_prompts(some)
        found |= {name: embeds, f"{name}_mask": mask_of(counts, embeds.shape[1])}
    return found


def guided(without: Tensor, with_prompt: Tensor, scale: float) -> Tensor:
    """Return the prediction of guidance, each token as long as that with the prompt."""
    whole = without + scale * (with_prompt - without)
    lengths = [_squares(one).sqrt() for one in (with_prompt, whole)]
    return whole * F.interpolate(lengths[0] / lengths[1], scale_factor=SIDE)


def _squares(latents: Tensor) -> Tensor:
    """Return the sum of squares of each token, [B, 1, h / 2, w / 2]."""
    return F.pixel_unshuffle(latents, SIDE).square().sum(1, keepdim=True)


QWEN_IMAGE = Family(
    name="qwen_image",
    title="Qwen-Image",
    denoiser=Denoiser(
        part="transformer",
        class_name="QwenImageTransformer2DModel",
        skip=("time_text_embed", "img_in", "txt_in", "norm_out", "proj_out"),
        token_wise=("attn.to_q", "attn.to_out", "img_mlp.net"),
        sample_size=128,
        shape=shape_of_squares,
        call=call,
        level=lambda options: float(options["timestep"].flatten()[0]),
        layout=QWEN_IMAGE_LAYOUT,
        fill=fill_positions,
    ),
    texts=Texts(
        classes={QWEN: LanguageModel("Qwen2_5_VLTextModel", (-1,))},
        encode=encode,
        widths=widths,
        clip_tokens=0,
        large=QWEN,
        large_tokens=TOKENS,
    ),
    sampling=Sampling(
        pipelines=("QwenImagePipeline",),
        schedulers=("FlowMatchEulerDiscreteScheduler",),
        steps=50,
        guidance=4.0,
        pipeline=pipeline,
        arguments=arguments,
        shift=flow_shift,
        set_times=set_even_times,
        unpacked=drawn,
        guided=guided,
        guidance_argument="true_cfg_scale",
    ),
    vae="AutoencoderKLQwenImage",
    vae_factors=("latents_mean", "latents_std"),
    objective=lambda scheduler: FLOW,
    hub=Hub(ids=r"qwen[-_]?image(?!-(edit|layered))", nbytes=58e9),
    architecture=lambda config: "qwen-image",
    source="https://github.com/QwenLM/Qwen-Image",
    gguf=("qwen_image",),
    gguf_kept=("img_in.", "txt_in.", "txt_norm.", "time_text_embed.", "norm_out.", "proj_out."),
    published=PUBLISHED,
)
