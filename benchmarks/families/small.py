"""Whole pipelines of every family that are small and random, with the same bits on every machine.

Tokenizers are built in code: the libraries' own test configurations fetch theirs from the Hub.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.small_pipeline import (
    LENGTH,
    SIDE,
    clip,
    fill_,
    t5,
    tokenizer,
    vae,
    words,
    write_pipeline,
)

# of Stable Diffusion 1.5 and XL
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def flux1(guidance: bool = True) -> dict[str, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=32,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 14, 14),
    )
    return {
        "transformer": fill_(transformer, 1),
        "vae": vae(16, 2, scaling_factor=0.5, shift_factor=0.125),
        "text_encoder": clip(3, "CLIPTextModel", 32),
        "text_encoder_2": t5(4),
        "tokenizer": words(),
        "tokenizer_2": tokenizer(LENGTH, "", "<end>"),
        "scheduler": FlowMatchEulerDiscreteScheduler(
            shift=3.0,
            use_dynamic_shifting=guidance,
            base_image_seq_len=256,
            max_image_seq_len=4096,
            base_shift=0.5,
            max_shift=1.15,
        ),
    }


def unet(**settings: Any) -> Any:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=SIDE // 8,
        layers_per_block=1,
        block_out_channels=(64, 128),
        cross_attention_dim=64,
        norm_num_groups=8,
        **settings,
    )
    return fill_(model, 1)


def sdxl() -> dict[str, Any]:
    from diffusers import EulerDiscreteScheduler

    return {
        "unet": unet(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=32 + 6 * 8,
        ),
        "vae": vae(4, 2, scaling_factor=0.5),
        "text_encoder": clip(3, "CLIPTextModel", 32),
        "text_encoder_2": clip(4, "CLIPTextModelWithProjection", 32),
        "tokenizer": words(),
        "tokenizer_2": words(),
        "scheduler": EulerDiscreteScheduler(**SCHEDULE, steps_offset=1, timestep_spacing="leading"),
    }


def sd15(prediction: str = "epsilon") -> dict[str, Any]:
    from diffusers import PNDMScheduler

    return {
        "unet": unet(
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=2,
        ),
        "vae": vae(4, 2, scaling_factor=0.5),
        "text_encoder": clip(3, "CLIPTextModel", 64),
        "tokenizer": words(),
        "scheduler": PNDMScheduler(
            **SCHEDULE, skip_prk_steps=True, steps_offset=1, prediction_type=prediction
        ),
    }


def language_model(key: int) -> Any:
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        max_window_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
    )
    return fill_(Qwen3Model(config), key)


def chat_words() -> Any:
    made = tokenizer(LENGTH, "", "<end>")
    made.chat_template = "{{ messages[0].content }}{% if add_generation_prompt %}:{% endif %}"
    return made


def zimage() -> dict[str, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel

    transformer = ZImageTransformer2DModel(
        dim=192,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=64,
        axes_dims=(24, 36, 36),
        axes_lens=(128, 16, 16),
    )
    return {
        "transformer": fill_(transformer, 1),
        "vae": vae(16, 2, scaling_factor=0.5, shift_factor=0.125),
        "text_encoder": language_model(3),
        "tokenizer": chat_words(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


CLASSES = {
    "sd3": "StableDiffusion3Pipeline",
    "flux1": "FluxPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sd15": "StableDiffusionPipeline",
    "zimage": "ZImagePipeline",
}
PARTS: Mapping[str, Callable[..., dict[str, Any]]] = {
    "flux1": flux1,
    "sdxl": sdxl,
    "sd15": sd15,
    "zimage": zimage,
}
NAMES = ("sd3", *PARTS)


def write(name: str, folder: Path, **settings: Any) -> Path:
    """Write a small random pipeline of a family and return its folder.

    Args:
        settings: of the family's variant: `guidance` of flux1, `prediction` of sd15.
    """
    file = folder / "model_index.json"
    if name == "sd3":
        index = json.loads((write_pipeline(folder) / file.name).read_text(encoding="utf-8"))
        classes = {part: kind[1] for part, kind in index.items() if isinstance(kind, list)}
    else:
        parts = PARTS[name](**settings)
        for part, model in parts.items():
            model.save_pretrained(folder / part)
        classes = {part: type(model).__name__ for part, model in parts.items()}
    whole: dict[str, Any] = {"_class_name": CLASSES[name]}
    whole |= {part: [_library(part), class_name] for part, class_name in classes.items()}
    if name == "sd15":
        whole |= dict.fromkeys(("safety_checker", "feature_extractor"), (None, None))
    file.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return folder


def _library(part: str) -> str:
    return "transformers" if part.startswith(("text_encoder", "tokenizer")) else "diffusers"
