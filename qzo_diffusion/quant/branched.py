"""A linear layer of codes with a 16-bit branch of low rank beside them, as SVDQuant and SDNQ have.

    y = t(x) Rᵀ + (t(x) downᵀ) upᵀ + bias      R [N, K] of codes, down [r, K], up [N, r]
    t(x) = x / smooth, or x times a Hadamard matrix in runs of inputs, or x

The scales of R and a gain for each of the r directions are trained, as two layers of their own:
`<layer>.residual` and `<layer>.down`. A factor of a row of R scales what R gives, not the branch.

R is `HqqLinear`, which has 4 or 8 bits, groups of inputs, and zeros that are no whole numbers.
With `rounds_inputs` the inputs of R are rounded to 4 bits, as kernels of W4A4 do; the branch sees
them as they are."""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qzo_diffusion.quant.hqq import HqqLinear

PARTS = ("residual", "down")
LARGEST = 7  # of an input in 4 bits


def residual_of(codes: Tensor, zeros: Tensor, scales: Tensor, bits: int = 4) -> HqqLinear:
    """The layer of codes uint8 [N, groups, size], zeros and scales [N, groups].

    Two codes of 4 bits go into a byte, the first half of all groups into the high bits, where the
    number of groups is even.
    """
    rows = codes.flatten(0, 1)
    if bits == 4 and len(rows) % 2 == 0:
        first, second = rows.chunk(2)
        return HqqLinear((first << 4) | second, 4, zeros.float(), scales.float(), None)
    return HqqLinear(rows.contiguous(), 8, zeros.float(), scales.float(), None)


class ScaledRows(nn.Module):
    """A linear without bias over numbers of 16 bits. Buffers: `codes` [N, K], `scales` fp32 [N]."""

    codes: Tensor
    scales: Tensor
    bias: None

    def __init__(self, codes: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = codes.shape
        self.register_buffer("codes", codes)
        self.register_buffer("scales", torch.ones(len(codes), device=codes.device))
        self.bias = None

    def dequantized(self) -> Tensor:
        """[N, K] in fp32."""
        return self.codes.float() * self.scales.unsqueeze(1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantized().to(x.dtype))


class BranchedLinear(nn.Module):
    """See above.

    Args:
        residual: R, without a bias.
        branch: up [N, r] and down [r, K]; None for no branch.
        smooth: [K]; None for ones. hadamard: length of the runs; 0 for no rotation.
    """

    up: Tensor | None
    smooth: Tensor | None

    def __init__(
        self,
        residual: HqqLinear,
        branch: tuple[Tensor, Tensor] | None,
        bias: Tensor | None,
        *,
        smooth: Tensor | None = None,
        hadamard: int = 0,
        rounds_inputs: bool = False,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = residual.out_features, residual.in_features
        self.residual = residual
        self.down = None if branch is None else ScaledRows(branch[1])
        self.register_buffer("up", None if branch is None else branch[0])
        self.register_buffer("smooth", smooth)
        self.hadamard, self.rounds_inputs = hadamard, rounds_inputs
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self._transformed(x)
        # first: nothing reads x after R, which may be given leave to overwrite it
        inner = None if self.down is None else self.down(x)
        group = self.in_features // self.residual.scales.shape[1]
        y = self.residual(rounded(x, group) if self.rounds_inputs else x)
        if inner is not None:
            y = y + F.linear(inner, self.up.to(x.dtype))  # type: ignore[union-attr]
        return y if self.bias is None else y + self.bias

    def _transformed(self, x: Tensor) -> Tensor:
        if self.hadamard:
            return rotated(x, self.hadamard)
        return x if self.smooth is None else x / self.smooth.to(x.dtype)

    def dequantized(self) -> Tensor:
        """The weight [N, K] of the layer as a whole, fp32, for inputs that are not transformed."""
        weight = self.residual.dequantized()
        if self.down is not None and self.up is not None:
            weight = weight + self.up.float() @ self.down.dequantized()
        if self.hadamard:
            return rotated(weight, self.hadamard)
        return weight if self.smooth is None else weight / self.smooth.float()


def rounded(x: Tensor, group: int) -> Tensor:
    """Inputs rounded to 4 bits: -7 .. 7 times a scale for each run of `group` inputs.

    Gradients pass as if nothing were rounded: those of a step are zero.
    """
    found: Tensor = _Rounded.apply(x, group)
    return found


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: Tensor, group: int) -> Tensor:
        runs = x.float().unflatten(-1, (-1, group))
        scale = runs.abs().amax(-1, keepdim=True).div_(LARGEST)
        steps = (runs / scale.clamp(min=torch.finfo(torch.float32).tiny)).round_()
        return (steps * scale).flatten(-2).to(x.dtype)

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def rotated(x: Tensor, size: int) -> Tensor:
    """Each run of `size` of the last dimension times a Hadamard matrix, its own inverse."""
    matrix = hadamard_matrix(size).to(x)
    return (x.unflatten(-1, (-1, size)) @ matrix).flatten(-2)


@cache
def hadamard_matrix(size: int) -> Tensor:
    """The symmetric orthogonal matrix that SDNQ uses, fp32: Kronecker powers of one of 4, or of one
    of 2 where `size` is no power of 4.
    """
    four = torch.ones(4, 4) - 2 * torch.eye(4).flip(0)
    step = four if size.bit_length() % 2 else torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(matrix, step)
    return matrix / size**0.5
