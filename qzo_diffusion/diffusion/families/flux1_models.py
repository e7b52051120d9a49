"""Shapes of published models of FLUX.1, for planning a run before the weights are here.

Sources: the config.json files on the Hub; schnell's is open, dev's differs in `guidance_embeds`.
"""

from typing import Any

from qzo_diffusion.diffusion.families.family import Published

_SCHNELL: dict[str, Any] = {
    "_class_name": "FluxTransformer2DModel",
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": False,
}
FLUX_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 16,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
_ENCODERS: dict[str, Any] = {
    "text_encoder": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
    },
    "text_encoder_2": {
        "d_model": 4096,
        "d_ff": 10240,
        "d_kv": 64,
        "num_heads": 64,
        "num_layers": 24,
        "vocab_size": 32128,
        "feed_forward_proj": "gated-gelu",
    },
}
PUBLISHED = {
    "black-forest-labs/FLUX.1-dev": Published(
        _SCHNELL | {"guidance_embeds": True}, FLUX_VAE, _ENCODERS
    ),
    "black-forest-labs/FLUX.1-schnell": Published(_SCHNELL, FLUX_VAE, _ENCODERS),
}
