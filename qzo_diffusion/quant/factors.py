"""Low-rank factors of a matrix, by its largest singular values.

M ≈ up · down      up [N, R], down [R, K]"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

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
