"""Invertible maps of a layer's inputs that are small: a factor for each number, then two matrices.

    x T,  T = diag(scale) (left ⊗ right)      as rows: X [a, b] -> leftᵀ X right

A linear layer whose inputs are mapped by T takes the weight W T⁻ᵀ and gives the same outputs,
since (x T) (W T⁻ᵀ)ᵀ = x Wᵀ. FlatQuant (arXiv 2410.09426) has such maps; a rotation is one whose
T⁻ᵀ is T itself."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

ROWS_AT_ONCE = 2**12
"""Rows of a weight that are float64 at the same time."""


@dataclass(frozen=True)
class KroneckerMap:
    """T of `a · b` numbers, in float64.

    Args:
        scale: [a · b].
        left: [a, a].
        right: [b, b].
    """

    scale: Tensor
    left: Tensor
    right: Tensor

    @property
    def size(self) -> int:
        return len(self.left) * len(self.right)

    def of(self, x: Tensor) -> Tensor:
        """x T: [..., a · b], in the dtype of the map."""
        return product(x * self.scale, self.left, self.right)

    def matrix(self) -> Tensor:
        """T itself, [a · b, a · b]."""
        return self.of(torch.eye(self.size, dtype=self.scale.dtype))

    def dual(self) -> "KroneckerMap":
        """T⁻ᵀ, which weights take."""
        left, right = (torch.linalg.inv(one).T.contiguous() for one in (self.left, self.right))
        return KroneckerMap(1 / self.scale, left, right)

    def of_rows(self, rows: Tensor) -> Tensor:
        """rows [N, a · b] times T: computed in float64, in fp32 unless `rows` are float64."""
        wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
        found = torch.empty(rows.shape, dtype=wide)
        for start in range(0, len(rows), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            found[part] = self.of(rows[part].double())
        return found


def product(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """x (left ⊗ right) for x [..., a · b]."""
    runs = x.unflatten(-1, (len(left), len(right)))
    return (left.T @ (runs @ right)).flatten(-2)


def rotation(right: Tensor, copies: int = 1) -> KroneckerMap:
    """The map that rotates each of `copies` runs of inputs by an orthogonal matrix."""
    right = right.double()
    left = torch.eye(copies, dtype=right.dtype)
    return KroneckerMap(torch.ones(copies * len(right), dtype=right.dtype), left, right)


class OnlineMap(nn.Module):
    """A map applied in the forward pass, in fp32, or in float64 where the model is.

    Args:
        one: T.
        back: apply T⁻¹ instead.
    """

    scale: Tensor
    left: Tensor
    right: Tensor

    def __init__(self, one: KroneckerMap, back: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.back = back
        dual = one.dual() if back else one
        left, right = (part.T if back else part for part in (dual.left, dual.right))
        for name, part in (("scale", dual.scale), ("left", left), ("right", right)):
            self.register_buffer(name, part.to(dtype).contiguous(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., a · b] -> the same shape and dtype."""
        wide = x.to(self.scale.dtype)
        if self.back:
            return (product(wide, self.left, self.right) * self.scale).to(x.dtype)
        return product(wide * self.scale, self.left, self.right).to(x.dtype)
