"""Grass: Adam on a few rows of each weight (arXiv 2406.17660), with top-r selection.

The projection Pᵀ keeps the r rows of the gradient with the largest norms, so that Pᵀ G is those
rows and P puts an update of [r, K] numbers back into them. Only these rows of a gradient are
computed, except in the step that chooses them anew, every `REFRESH` steps, when moments begin at
zero again."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS, REFRESH = 64, 16
BETA1, BETA2, TINY = 0.9, 0.99, 1e-8


def strongest_rows(gradient: Tensor, count: int) -> Tensor:
    """The places of the rows of largest norm, ascending: [N, K] -> [count]."""
    return gradient.norm(dim=1).topk(min(count, len(gradient))).indices.sort().values


def project(gradient: Tensor, rows: Tensor) -> Tensor:
    """Pᵀ G: [N, K] -> [r, K]."""
    return gradient[rows]


def project_back(update: Tensor, rows: Tensor, like: Tensor) -> Tensor:
    """P u: [r, K] -> [N, K] with zeros in the other rows."""
    return torch.zeros_like(like).index_copy(0, rows, update)


class _RowsOfGradient(torch.autograd.Function):
    """x Wᵀ, whose way back gives the layer Pᵀ G in place of a gradient of W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: "GrassLinear") -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        return F.linear(x, layer.weight.to(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        (x,), slope = ctx.saved_tensors, slopes[0]
        ctx.layer.take(slope.flatten(0, -2), x.flatten(0, -2))
        return slope @ ctx.layer.weight.to(slope.dtype), None


class GrassLinear(nn.Module):
    """A linear whose weight, an fp32 master, is changed by `step_`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight.detach().float(), linear.bias
        self._rows: Tensor | None = None
        self._gradient, self._steps = torch.empty(0), 0

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _RowsOfGradient.apply(x, self)
        return out

    def take(self, slope: Tensor, x: Tensor) -> None:
        """Compute Pᵀ G of G = slopeᵀ x, and choose P first where it is time to."""
        if self._rows is None:
            gradient = (slope.T @ x).float()
            self._rows = strongest_rows(gradient, ROWS)
            self._gradient = project(gradient, self._rows)
            self._first, self._second = (torch.zeros_like(self._gradient) for _ in range(2))
        else:
            self._gradient = (slope[:, self._rows].T @ x).float()

    def step_(self, lr: float) -> None:
        """Adam on the rows."""
        assert self._rows is not None
        self._steps += 1
        self._first.lerp_(self._gradient, 1 - BETA1)
        self._second.lerp_(self._gradient.square(), 1 - BETA2)
        root = (self._second / (1 - BETA2**self._steps)).sqrt_().add_(TINY)
        update = self._first / (1 - BETA1**self._steps) / root
        self.weight.index_add_(0, self._rows, update, alpha=-lr)
        if self._steps == REFRESH:
            self._rows, self._steps = None, 0
