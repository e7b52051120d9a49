"""Several processes that train one model, each on its own part of every batch.

`torchrun --nproc-per-node 2 -m benchmarks.tiny ...` starts them; without torchrun there is one.
Gradients are averaged over gloo in one flat buffer."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """The one that saves, draws and reports."""
        return self.rank == 0

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over all ranks."""
        if self.count == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.count
        parts = flat.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


def join() -> Ranks:
    """The ranks that torchrun started; one where it did not."""
    if "WORLD_SIZE" not in os.environ:
        return Ranks()
    dist.init_process_group("gloo")
    return Ranks(dist.get_rank(), dist.get_world_size())


def leave(ranks: Ranks) -> None:
    if ranks.count > 1:
        dist.destroy_process_group()
