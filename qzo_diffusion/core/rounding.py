"""Rounding at random, to the number itself on average, with random numbers that can be drawn
again."""

import torch
from torch import Tensor

from qzo_diffusion.core.noise import packed_bits


def stochastic_round(x: Tensor, *key: int | str) -> Tensor:
    """Q(x): round flat fp32 x at random to one of the two neighbouring integers, x on average.

    Chances are exact to 2^-25 near 1, where fp32 rounds them, and to 2^-31 below 2^-7. The
    magnitude is rounded and its sign put back, so that a small negative x keeps its precision."""
    magnitude = x.abs()
    whole = magnitude.floor()
    if torch.equal(magnitude, whole):  # as every probe of signs with a whole ε: nothing to draw
        return whole.copysign_(x)
    raw = torch.from_numpy(packed_bits(32 * x.numel(), *key)[: 4 * x.numel()].view("<i4")).to(
        x.device
    )
    chance = raw.bitwise_and_(2**31 - 1).to(x.dtype).mul_(2.0**-31)
    return whole.add_(chance < magnitude.sub_(whole)).copysign_(x)
