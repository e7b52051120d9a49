"""Whole pipelines of every family that are small and random, with the same bits on every machine.

Tokenizers are built in code: the libraries' own test configurations fetch theirs from the Hub.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

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

LENGTHS = {"qwen_image": 256}  # of families whose prompts begin with an instruction
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


def language(class_name: str, key: int, layers: int, **settings: Any) -> Any:
    """A language model of one head, by its class with a head of words."""
    import transformers

    kind = getattr(transformers, class_name)
    text = {
        "vocab_size": 258,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "bos_token_id": 257,
        "eos_token_id": 256,
    }
    return fill_(kind(kind.config_class(**(settings or text | {"head_dim": 32}))), key)


def flux2(distilled: bool = False) -> dict[str, Any]:
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2Transformer2DModel,
    )

    transformer = Flux2Transformer2DModel(
        in_channels=128,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=96,
        timestep_guidance_channels=32,
        axes_dims_rope=(8, 8, 8, 8),
        guidance_embeds=False,
    )
    chat = tokenizer(LENGTH, "<begin>", "<end>")
    chat.chat_template = "{% for turn in messages %}[{{ turn['content'] }}]{% endfor %}"
    return {
        "transformer": fill_(transformer, 1),
        "vae": with_statistics(AutoencoderKLFlux2(**SMALL_VAE, latent_channels=32), 2),
        "text_encoder": language("Qwen3ForCausalLM", 3, layers=28),
        "tokenizer": chat,
        "scheduler": FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_image_seq_len=256, max_image_seq_len=4096
        ),
        "is_distilled": distilled,
    }


SMALL_VAE: Mapping[str, Any] = {
    "block_out_channels": (8, 8, 8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": SIDE,
}


def with_statistics(model: Any, key: int) -> Any:
    """Return a VAE whose channels have means and variances that differ."""
    fill_(model, key)
    count = len(model.bn.running_mean)
    model.bn.running_mean.copy_(torch.arange(count) / count - 0.5)
    model.bn.running_var.copy_(torch.arange(count) / count + 0.25)
    return model


def qwen_image() -> dict[str, Any]:
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImageTransformer2DModel,
    )

    transformer = QwenImageTransformer2DModel(
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 14, 14),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[index / 16 - 0.5 for index in range(16)],
        latents_std=[index / 16 + 0.5 for index in range(16)],
    )
    return {
        "transformer": fill_(transformer, 1),
        "vae": fill_(vae, 2),
        "text_encoder": qwen_vision(3),
        "tokenizer": tokenizer(LENGTHS["qwen_image"], "", "<end>"),
        "scheduler": FlowMatchEulerDiscreteScheduler(
            shift=1.0,
            use_dynamic_shifting=True,
            base_image_seq_len=256,
            max_image_seq_len=8192,
            base_shift=0.5,
            max_shift=0.9,
            shift_terminal=0.02,
        ),
    }


def qwen_vision(key: int) -> Any:
    """Qwen2.5-VL, whose tower of pictures nothing here reads."""
    text = {
        "vocab_size": 257,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "max_window_layers": 2,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "bos_token_id": None,
        "eos_token_id": 256,
        "pad_token_id": 256,
    }
    tower = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 1}
    tower |= {"out_hidden_size": 32, "fullatt_block_indexes": [0]}
    settings = {"text_config": text, "vision_config": tower, "tie_word_embeddings": False}
    return language("Qwen2_5_VLForConditionalGeneration", key, 2, **settings)


CLASSES = {
    "flux2": "Flux2KleinPipeline",
    "qwen_image": "QwenImagePipeline",
    "sd3": "StableDiffusion3Pipeline",
    "flux1": "FluxPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sd15": "StableDiffusionPipeline",
    "zimage": "ZImagePipeline",
}
PARTS: Mapping[str, Callable[..., dict[str, Any]]] = {
    "flux1": flux1,
    "flux2": flux2,
    "qwen_image": qwen_image,
    "sdxl": sdxl,
    "sd15": sd15,
    "zimage": zimage,
}
NAMES = ("sd3", *PARTS)


def write(name: str, folder: Path, **settings: Any) -> Path:
    """Write a small random pipeline of a family and return its folder.

    Args:
        settings: of the family's variant: `guidance` of flux1, `distilled` of flux2, `prediction`
            of sd15.
    """
    file, others = folder / "model_index.json", {}
    if name == "sd3":
        index = json.loads((write_pipeline(folder) / file.name).read_text(encoding="utf-8"))
        classes = {part: kind[1] for part, kind in index.items() if isinstance(kind, list)}
    else:
        parts = PARTS[name](**settings)
        others = {key: parts.pop(key) for key in ("is_distilled",) if key in parts}
        for part, model in parts.items():
            model.save_pretrained(folder / part)
        classes = {part: type(model).__name__ for part, model in parts.items()}
    whole: dict[str, Any] = {"_class_name": CLASSES[name], **others}
    whole |= {part: [_library(part), class_name] for part, class_name in classes.items()}
    if name == "sd15":
        whole |= dict.fromkeys(("safety_checker", "feature_extractor"), (None, None))
    file.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return folder


def _library(part: str) -> str:
    return "transformers" if part.startswith(("text_encoder", "tokenizer")) else "diffusers"
