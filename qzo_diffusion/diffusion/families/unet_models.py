"""Shapes of published UNets, for planning a run before the weights are here.

Sources: the config.json files of Stable Diffusion XL base 1.0, 1.5 and 2.1 on the Hub.
"""

from typing import Any

from qzo_diffusion.diffusion.families.family import Published

_UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
}
_THREE_OF_FOUR: dict[str, Any] = {
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
_SDXL = _UNET | {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_SD15 = (
    _UNET
    | _THREE_OF_FOUR
    | {
        "sample_size": 64,
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    }
)
_SD21 = (
    _UNET
    | _THREE_OF_FOUR
    | {
        "sample_size": 96,
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
        "upcast_attention": True,
    }
)


def _vae(scaling_factor: float) -> dict[str, Any]:
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "scaling_factor": scaling_factor,
    }


_CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
_CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
_CLIP_H = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "projection_dim": 512,
    "hidden_act": "gelu",
}
SDXL_MODELS = {
    "stabilityai/stable-diffusion-xl-base-1.0": Published(
        _SDXL, _vae(0.13025), {"text_encoder": _CLIP_L, "text_encoder_2": _CLIP_G}
    ),
}
SD15_MODELS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": Published(
        _SD15, _vae(0.18215), {"text_encoder": _CLIP_L}
    ),
    "stabilityai/stable-diffusion-2-1": Published(_SD21, _vae(0.18215), {"text_encoder": _CLIP_H}),
}
