"""Shapes of published models of FLUX.2 klein, for planning a run before the weights are here.

Sources: the config.json files on the Hub, and those of Qwen3-4B and Qwen3-8B.
"""

from collections.abc import Mapping
from typing import Any

from qzo_diffusion.diffusion.families.family import Published

_4B: dict[str, Any] = {
    "_class_name": "Flux2Transformer2DModel",
    "patch_size": 1,
    "in_channels": 128,
    "num_layers": 5,
    "num_single_layers": 20,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "mlp_ratio": 3.0,
    "axes_dims_rope": [32, 32, 32, 32],
    "rope_theta": 2000,
    "guidance_embeds": False,
}
_9B = _4B | {
    "num_layers": 8,
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 12288,
}
_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKLFlux2",
    "block_out_channels": [128, 256, 512, 512],
    "latent_channels": 32,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "batch_norm_eps": 0.0001,
}
_QWEN3_4B: dict[str, Any] = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
_QWEN3_8B = _QWEN3_4B | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "tie_word_embeddings": False,
}


def _published(
    denoiser: Mapping[str, Any], encoder: Mapping[str, Any], distilled: bool
) -> Published:
    return Published(denoiser, _VAE, {"text_encoder": encoder}, {"is_distilled": distilled})


PUBLISHED = {
    "black-forest-labs/FLUX.2-klein-base-4B": _published(_4B, _QWEN3_4B, False),
    "black-forest-labs/FLUX.2-klein-4B": _published(_4B, _QWEN3_4B, True),
    "black-forest-labs/FLUX.2-klein-base-9B": _published(_9B, _QWEN3_8B, False),
    "black-forest-labs/FLUX.2-klein-9B": _published(_9B, _QWEN3_8B, True),
}
