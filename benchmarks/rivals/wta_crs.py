"""WTA-CRS: the gradient of a weight from a part of the tokens (arXiv 2305.15265).

G = Σ_i slope_i x_iᵀ over all tokens is estimated from k of them. Those of the largest norms, C, are
all taken; the others are drawn with their probabilities p:

    G ≈ Σ_C slope_i x_iᵀ + (1 - p(C)) / (k - |C|) · Σ_j slope_j x_jᵀ / p_j      (equation 6)

which is unbiased for any p. |C| is the one of least variance. Only the k inputs are kept for the
way back. The paper takes p from norms of inputs and of slopes in the last epoch; here they are
those of inputs, since an example is seen about once."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHARE = 0.3  # of the tokens that are kept


def chosen(norms: Tensor, budget: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The tokens that are kept, some of them perhaps twice, and the factor of each: both [budget].

    Args:
        norms: [tokens], which p is proportional to.
    """
    shares, order = (norms / norms.sum()).sort(descending=True)
    without = 1 - torch.cat([shares.new_zeros(1), shares.cumsum(0)[: budget - 1]])
    winners = int((without / torch.arange(budget, 0, -1)).argmin())
    drawn = budget - winners
    rest = shares[winners:]
    places = winners + torch.multinomial(rest, drawn, replacement=True, generator=generator)
    factors = rest.sum() / (drawn * shares[places])
    return torch.cat([order[:winners], order[places]]), torch.cat([torch.ones(winners), factors])


class _SampledGradient(torch.autograd.Function):
    """x Wᵀ with the exact slope of x and the estimate of that of W; a bias is not trained."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, generator: torch.Generator
    ) -> Tensor:
        tokens = x.flatten(0, -2)
        budget = math.ceil(SHARE * len(tokens))
        places, factors = chosen(tokens.float().norm(dim=1), budget, generator)
        ctx.save_for_backward(tokens[places], places, factors, weight)
        return F.linear(x, weight.to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, Tensor, None, None]:
        kept, places, factors, weight = ctx.saved_tensors
        slope = slopes[0]
        some = slope.flatten(0, -2)[places] * factors.unsqueeze(1).to(slope.dtype)
        return slope @ weight.to(slope.dtype), (some.T @ kept).to(weight.dtype), None, None


class WtaCrsLinear(nn.Module):
    """A linear whose weight, an fp32 master, is trained by the estimate."""

    def __init__(self, linear: nn.Linear, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().float())
        self.bias, self._generator = linear.bias, generator

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return F.linear(x, self.weight.to(x.dtype), self.bias)
        out: Tensor = _SampledGradient.apply(x, self.weight, self.bias, self._generator)
        return out
