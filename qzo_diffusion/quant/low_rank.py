"""Low-rank factors of the change that a run made to each weight, as LoRA files hold it.

    W_tuned - W_base ≈ up · down      up [N, R], down [R, K]: the R largest singular values

A change of scales has a rank as high as the layer allows: a factor for each row changes all
singular values. So a LoRA of a low rank keeps a part of it alone, which is measured here."""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from qzo_diffusion.core.scales import ScaleSet
from qzo_diffusion.quant import bnb
from qzo_diffusion.quant.factors import LowRank, low_rank
from qzo_diffusion.quant.load import CodedHandle, handles_of


def low_rank_changes(
    model: nn.Module, scales: ScaleSet, tuned: Mapping[str, Tensor], rank: int
) -> dict[str, LowRank]:
    """The factors of every layer that `tuned` changes, all with the same R: `rank`, or the most
    that a layer has. The live scales, which hold the base, are left as they are.
    """
    handles = {handle.name: handle for handle in handles_of(model)}
    changed = [
        name
        for name in scales
        if name in handles and not torch.equal(scales[name], tuned[name].to(scales[name].device))
    ]
    most = max((min(_shape(handles[name])) for name in changed), default=0)
    return {
        name: low_rank(change, min(rank, most))
        for name, change in _changes(handles, changed, scales, tuned)
    }


def norm_kept(layers: Mapping[str, LowRank]) -> float:
    """The norm of all factors' products over the norm of all changes, from 0 to 1."""
    return math.sqrt(
        sum(one.kept for one in layers.values()) / sum(one.whole for one in layers.values())
    )


def _changes(
    handles: Mapping[str, CodedHandle],
    names: list[str],
    scales: ScaleSet,
    tuned: Mapping[str, Tensor],
) -> Iterator[tuple[str, Tensor]]:
    """Name and W_tuned - W_base, fp32 [N, K], one layer at a time."""
    for name in names:
        live, before = scales[name], _full_precision(handles[name])
        base = live.clone()
        try:
            live.copy_(tuned[name])
            after = _full_precision(handles[name])
        finally:
            live.copy_(base)
        yield name, after - before


def _full_precision(handle: CodedHandle) -> Tensor:
    """The weight in fp32; in bfloat16 most of a small change would be rounding."""
    if isinstance(handle, bnb.BnbHandle):
        return bnb.dequantized_in(handle.module, torch.float32)
    return handle.dequantized().float()


def _shape(handle: CodedHandle) -> tuple[int, int]:
    module = handle.module
    return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
