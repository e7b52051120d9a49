"""Shapes of Z-Image and Z-Image-Turbo, for planning a run before the weights are here.

Sources: the config.json files on the Hub. Both have one shape, and
the VAE of FLUX.1.
"""

from typing import Any

from qzo_diffusion.diffusion.families.family import Published
from qzo_diffusion.diffusion.families.flux1_models import FLUX_VAE

_TRANSFORMER: dict[str, Any] = {
    "_class_name": "ZImageTransformer2DModel",
    "all_patch_size": [2],
    "all_f_patch_size": [1],
    "in_channels": 16,
    "dim": 3840,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "n_kv_heads": 30,
    "norm_eps": 1e-5,
    "qk_norm": True,
    "cap_feat_dim": 2560,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
}
QWEN3_4B: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
PUBLISHED = {
    f"Tongyi-MAI/{name}": Published(_TRANSFORMER, FLUX_VAE, {"text_encoder": QWEN3_4B})
    for name in ("Z-Image", "Z-Image-Turbo")
}
