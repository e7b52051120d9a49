"""The model of this benchmark: synthetic weights in the shapes of SD3.5 Large, and how they are
read.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.full_size import model

LARGE = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 38,
    "attention_head_dim": 64,
    "num_attention_heads": 38,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 2432,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "dual_attention_layers": [],
    "qk_norm": "rms_norm",
}
T5_TOKENS, CLIP_TOKENS = 256, 77


def config_of(layers: int) -> dict[str, Any]:
    return LARGE | {"num_layers": layers}


def load_model(folder: Path, cache: Path | None) -> nn.Module:
    from qzo_diffusion.diffusion.families.sd3 import SD3

    return model.load_model(SD3, folder, cache)


def import_everything() -> None:
    model.import_everything(config_of(1))


def batch_of(transformer: Any, side: int, count: int = 1) -> Any:
    from qzo_diffusion.diffusion.flow_matching import Batch

    generator = torch.Generator().manual_seed(0)
    latents, noise = (
        torch.randn(count, 16, side // 8, side // 8, generator=generator) for _ in range(2)
    )
    embeds = torch.randn(
        count, CLIP_TOKENS + T5_TOKENS, transformer.config.joint_attention_dim, generator=generator
    )
    pooled = torch.randn(count, transformer.config.pooled_projection_dim, generator=generator)
    return Batch(latents, noise, torch.full((count,), 0.5), embeds, pooled)
