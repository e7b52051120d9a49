"""Low-rank factors of the change that a run made to each weight, as LoRA files hold it.

    W_tuned - W_base ≈ up · down      up [N, R], down [R, K]: the R largest singular values

A change of scales has a rank as high as the layer allows: a factor for each row changes all
singular values. So a LoRA of a low rank keeps a part of it alone, which is measured here."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qzo_diffusion.core.scales import ScaleSet
from qzo_diffusion.quant import bnb
from qzo_diffusion.quant.load import CodedHandle, handles_of

STORED = torch.float16  # finer than bfloat16; factors are far from the ends of its range
SPARE = 8  # further directions of the random search, so that the last wanted ones are found
ROUNDS = 4  # of the search; each sharpens the directions by the squares of the singular values
EXACT_BELOW = 512  # rows or columns up to which the whole decomposition is quick


@dataclass(frozen=True)
class LowRank:
    """Factors of one layer's change in `STORED`, and two squared norms in fp32.

    up [N, R], down [R, K]. kept: of up · down. whole: of the change itself.
    """

    up: Tensor
    down: Tensor
    kept: float
    whole: float


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


def low_rank(change: Tensor, rank: int) -> LowRank:
    """Factors of `change` [N, K] with R = `rank`; where it is above N or K, zeros are added.

    Large layers are searched along random directions of a fixed seed (Halko, Martinsson and Tropp,
    arXiv 0909.4061), so that equal changes have equal factors.
    """
    smaller = min(change.shape)
    wanted = rank + SPARE
    if smaller <= EXACT_BELOW or 4 * wanted >= smaller:
        left, values, right = torch.linalg.svd(change, full_matrices=False)
    else:
        basis = _leading_directions(change, wanted)
        inner, values, right = torch.linalg.svd(basis.T @ change, full_matrices=False)
        left = basis @ inner
    root = values[:rank].sqrt()
    missing = max(0, rank - smaller)
    up = nn.functional.pad(left[:, :rank] * root, (0, missing))
    down = nn.functional.pad(root.unsqueeze(1) * right[:rank], (0, 0, 0, missing))
    kept = float(values[:rank].double().square().sum())
    return LowRank(
        up.to(STORED), down.to(STORED), kept, max(kept, float(change.double().square().sum()))
    )


def _leading_directions(change: Tensor, count: int) -> Tensor:
    """An orthonormal basis [N, count] of nearly the span of the leading singular vectors."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(change.shape[1], count, generator=generator).to(change)
    basis = torch.linalg.qr(change @ drawn).Q
    for _ in range(ROUNDS):
        basis = torch.linalg.qr(change @ (change.T @ basis)).Q
    return basis


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
