"""The model of this benchmark: synthetic weights in the shapes of SD3.5 Large, and how they are
read.
"""

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.resident import resident

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
SHARD = 4e9  # bytes
T5_TOKENS, CLIP_TOKENS = 256, 77


def status(field: str) -> float:
    """GB of a field of /proc/self/status."""
    return resident(field) / 1e9


def need_disk(folder: Path, gigabytes: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free / 1e9
    if free < gigabytes:
        sys.exit(
            f"{folder}: {free:.1f} GB free, {gigabytes:.1f} needed; give another --folder or "
            "free some space"
        )


def synthetic(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Normal numbers as an initialized layer has; norms at one. A million are drawn and repeated:
    drawing 8e9 takes minutes.
    """
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    drawn = torch.randn(min(2**20 + 7, math.prod(shape)), generator=generator) / math.sqrt(
        math.prod(shape[1:])
    )
    repeats = -(-math.prod(shape) // drawn.numel())
    return drawn.to(dtype).repeat(repeats)[: math.prod(shape)].view(shape)


def write_synthetic(
    model: nn.Module, folder: Path, stem: str, dtype: torch.dtype = torch.bfloat16
) -> int:
    """Shards and their index for every tensor of a model on the meta device.

    Returns the number of parameters.
    """
    from qzo_diffusion.quant.weights import Pending, write_tensors

    generator = torch.Generator().manual_seed(0)
    shards: list[dict[str, Pending]] = [{}]
    filled = 0.0
    for name, tensor in model.state_dict().items():
        size = tensor.numel() * dtype.itemsize
        if filled and filled + size > SHARD:
            shards.append({})
            filled = 0.0
        shape = tuple(tensor.shape)
        shards[-1][name] = Pending(
            dtype, shape, lambda shape=shape: synthetic(shape, generator, dtype)
        )  # type: ignore[misc]
        filled += size
    names = [
        f"{stem}-{index + 1:05d}-of-{len(shards):05d}.safetensors" for index in range(len(shards))
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for name, shard in zip(names, shards, strict=True):
        write_tensors(folder / name, shard, {})
        print("wrote", folder / name, file=sys.stderr)
    weight_map = {
        tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard
    }
    (folder / f"{stem}.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return sum(parameter.numel() for parameter in model.parameters())


def config_of(layers: int) -> dict[str, Any]:
    return LARGE | {"num_layers": layers}


def load_model(folder: Path, cache: Path | None) -> nn.Module:
    from qzo_diffusion.diffusion.families.sd3 import SD3
    from qzo_diffusion.diffusion.transformer import empty_transformer, find_transformer
    from qzo_diffusion.quant.stream import Quantization
    from qzo_diffusion.runs.loading import Source, load_quantized

    found = find_transformer(folder / "transformer")
    source = Source(found.entries, lambda: empty_transformer(found.config))
    how = Quantization(skip=SD3.denoiser.skip)
    options = {
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "cache": cache,
        "smallest_cached": 0,
    }
    return load_quantized(source, how, **options)  # type: ignore[arg-type]


def import_everything() -> None:
    """As a run does; the empty model also makes diffusers import what it needs."""
    import bitsandbytes  # noqa: F401

    from qzo_diffusion.diffusion.transformer import empty_transformer

    empty_transformer(config_of(1))


def batch_of(model: Any, side: int, count: int = 1) -> Any:
    from qzo_diffusion.diffusion.flow_matching import Batch

    generator = torch.Generator().manual_seed(0)
    latents, noise = (
        torch.randn(count, 16, side // 8, side // 8, generator=generator) for _ in range(2)
    )
    embeds = torch.randn(
        count, CLIP_TOKENS + T5_TOKENS, model.config.joint_attention_dim, generator=generator
    )
    pooled = torch.randn(count, model.config.pooled_projection_dim, generator=generator)
    return Batch(latents, noise, torch.full((count,), 0.5), embeds, pooled)
