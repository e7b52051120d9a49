"""LSQ: learned step sizes, with codes that are rounded again from a master copy in every forward
(arXiv 1902.08153; LG-LSQ, arXiv 2202.09009, keeps that and changes the slope of rounding).

With w the master, s the step of its block and [-N, P] the range of codes:

    ŵ = s · round(clamp(w / s, -N, P))
    ∂ŵ/∂w = 1 within the range, 0 outside                          (straight through)
    ∂ŵ/∂s = round(w / s) - w / s within the range, -N or P outside  (equation 3)

and the slope of a step is divided by √(size of the block · P) (section 2.2)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOWEST, HIGHEST = -8, 7  # 4 bits
BLOCK = 64


def first_steps(master: Tensor) -> Tensor:
    """2 · mean|w| / √P of each block: [N, K] -> [N, K / 64] (section 2.1)."""
    return 2 * master.view(len(master), -1, BLOCK).abs().mean(-1) / HIGHEST**0.5


class Quantize(torch.autograd.Function):
    """Master [N, K] and steps [N, K / 64] -> ŵ [N, K]. Keeps nothing but the two for the way
    back.
    """

    @staticmethod
    def forward(ctx: Any, master: Tensor, steps: Tensor) -> Tensor:
        ctx.save_for_backward(master, steps)
        blocks = master.view(*steps.shape, BLOCK) / steps.unsqueeze(-1)
        codes = blocks.clamp_(LOWEST, HIGHEST).round_()
        return codes.mul_(steps.unsqueeze(-1)).view_as(master)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, Tensor]:
        master, steps = ctx.saved_tensors
        ratio = master.view(*steps.shape, BLOCK) / steps.unsqueeze(-1)
        slope = slopes[0].view_as(ratio)
        codes = ratio.clamp(LOWEST, HIGHEST)
        inside = (codes == ratio).float()
        of_step = codes.round_().sub_(ratio.mul_(inside)).mul_(slope).sum(-1)
        return inside.mul_(slope).view_as(master), of_step.div_((BLOCK * HIGHEST) ** 0.5)


class LsqLinear(nn.Module):
    """A linear with 4-bit weights whose master and steps are trained."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().float())
        self.steps = nn.Parameter(first_steps(self.weight.detach()))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = Quantize.apply(self.weight, self.steps)
        return F.linear(x, weight.to(x.dtype), self.bias)
