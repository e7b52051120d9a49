"""Synthetic weights in the real shapes of a model, in shards as a download has them."""

import json
import math
import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.resident import resident

SHARD = 4e9  # bytes


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
