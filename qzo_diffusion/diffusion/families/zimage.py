"""Z-Image, and Z-Image-Turbo, which is distilled to few steps.

The transformer takes a list of latents and a list of prompts of different lengths, and pads both to
whole runs of 32 tokens by itself. Time runs from 0 at pure noise to 1, and the output is the
negated velocity. Qwen3 gives the prompt: the last but one hidden state of a turn of a chat.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qzo_diffusion.diffusion.encoded_prompt import EncodedPrompt
from qzo_diffusion.diffusion.families.family import (
    Config,
    Denoiser,
    Encoders,
    Family,
    Hub,
    Sampling,
    Shape,
    Texts,
    large_tokenizer,
)
from qzo_diffusion.diffusion.families.shift import flow_shift, shift_options
from qzo_diffusion.diffusion.families.zimage_layout import ZIMAGE_LAYOUT
from qzo_diffusion.diffusion.families.zimage_models import PUBLISHED
from qzo_diffusion.diffusion.language_model import (
    LanguageModel,
    chat_text,
    language_states,
    text_config,
)
from qzo_diffusion.diffusion.objectives import FLOW, TIMES
from qzo_diffusion.diffusion.text_encoders import longest

TEXT = "text_encoder"
TOKENS = 512  # that the pipeline reads of a prompt, with the words of the chat


def without_padding(embeds: Tensor, counts: Tensor) -> list[Tensor]:
    """Return the embeddings [t, D] of each prompt of embeds [B, T, D]; without counts all of T."""
    if not counts.shape[-1]:
        return list(embeds)
    return [one[:count] for one, count in zip(embeds, counts[:, 0].tolist(), strict=True)]


def call(
    denoiser: Any,
    noisy: Tensor,
    time: Tensor,
    prompts: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    guidance: float | None = None,
) -> Tensor:
    output = denoiser(
        list(noisy.to(dtype).unsqueeze(2)),  # pictures are videos of one frame
        (TIMES - time) / TIMES,
        without_padding(prompts[0].to(dtype), prompts[1]),
        return_dict=False,
    )[0]
    return -torch.stack(list(output)).squeeze(2).float()


def level(options: Mapping[str, Any]) -> float:
    return 1 - float(options["timestep"].flatten()[0])


def set_times(scheduler: Any, steps: int, tokens: int, device: torch.device) -> None:
    sigmas = torch.linspace(1, 1 / steps, steps).tolist()
    options = shift_options(scheduler, tokens)
    scheduler.set_timesteps(sigmas=sigmas, device=device, **options)


def encode(encoders: Encoders, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
    """Prompts run without padding; causal layers give the same states as with it."""
    tokenizer, length = large_tokenizer(encoders, TEXT, TOKENS)
    texts = [chat_text(tokenizer, prompt, enable_thinking=True) for prompt in prompts]
    states = encoders.run(TEXT, lambda encoder, own: language_states(encoder, own, texts, length))
    return [
        {
            "embeds": F.pad(state, (0, 0, 0, length - state.shape[1]))[0],
            "pooled": torch.tensor([state.shape[1]]),
            "tokens": longest(text, [(tokenizer, length)]),
        }
        for text, state in zip(texts, states, strict=True)
    ]


def widths(denoiser: Config, encoders: Mapping[str, Config]) -> list[tuple[str, Any, Any]]:
    hidden = text_config(encoders[TEXT]).get("hidden_size")
    return [("prompts", hidden, denoiser["cap_feat_dim"])]


def shape(config: Config) -> Shape:
    return Shape(
        width=config["dim"],
        latents=config["all_patch_size"][0],
        text_width=config["cap_feat_dim"],
        channels=config["in_channels"],
    )


def pipeline(denoiser: Any, scheduler: Any, vae: Any) -> Any:
    from diffusers import ZImagePipeline

    return ZImagePipeline(scheduler, vae, None, None, denoiser)


def arguments(
    prompts: Sequence[EncodedPrompt], negatives: Sequence[EncodedPrompt]
) -> dict[str, Any]:
    return {
        "prompt_embeds": [one.embeds[: int(one.pooled)] for one in prompts],
        "negative_prompt_embeds": [one.embeds[: int(one.pooled)] for one in negatives],
    }


ZIMAGE = Family(
    name="zimage",
    title="Z-Image",
    denoiser=Denoiser(
        part="transformer",
        class_name="ZImageTransformer2DModel",
        skip=("all_x_embedder", "cap_embedder", "t_embedder", "all_final_layer"),
        token_wise=(),  # pads and prompts lie behind an image's tokens in every layer
        sample_size=128,
        shape=shape,
        call=call,
        level=level,
        layout=ZIMAGE_LAYOUT,
    ),
    texts=Texts(
        classes={TEXT: LanguageModel("Qwen3Model", (-2,))},
        encode=encode,
        widths=widths,
        clip_tokens=0,
        large=TEXT,
        large_tokens=TOKENS,
    ),
    sampling=Sampling(
        pipelines=("ZImagePipeline",),
        schedulers=("FlowMatchEulerDiscreteScheduler",),
        steps=28,
        guidance=4.0,
        pipeline=pipeline,
        arguments=arguments,
        shift=flow_shift,
        set_times=set_times,
        unguided=0.0,
    ),
    vae_factors=("scaling_factor", "shift_factor"),
    objective=lambda scheduler: FLOW,
    hub=Hub(ids=r"z-?image", nbytes=33e9),
    architecture=lambda config: "z-image",
    source="https://github.com/Tongyi-MAI/Z-Image",
    gguf=("lumina2",),
    gguf_kept=("x_embedder.", "cap_embedder.", "t_embedder.", "final_layer."),
    published=PUBLISHED,
)
