"""GPTQ's 4-bit format (arXiv 2210.17323), read and dequantized here: a reading of the files of
AutoGPTQ and gptqmodel.

    w[k, o] = scales[g, o] · (q[k, o] - zero[g, o])        g = g_idx[k], the group of input k

    qweight int32 [K / 8, N]    eight inputs a word, the first in the lowest four bits
    qzeros  int32 [K / group, N / 8]    eight outputs a word; in files of version 1
                                        each is one less than the zero
    scales  fp16  [K / group, N]

Traps that this file disarms, each held by a test:
* Some public files state the wrong version. The zeros of a symmetric file tell it: 7 on disk is
  version 1, 8 is version 2.
* fp16 scales lose most updates. The live scales are fp32; only their rounding goes to disk.
* Kernels that repack the weight or copy the scales don't see changed ones. None of them is used.
* With `desc_act` the inputs of a group are not neighbours. Columns are put in order once, inputs in
  every forward. A block of columns is then a group.
"""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qzo_diffusion.core.errors import ModelError

PARTS = ("qweight", "qzeros", "scales", "g_idx")
STORED = "scales"  # the part that is trained
PER_WORD, BITS = 8, 4
SYMMETRIC = {7: 1, 8: 2}  # a zero in the middle, as each version stores it
Version = Literal[1, 2]


def unpack(words: Tensor, dim: int) -> Tensor:
    """int32 -> uint8 with eight times the entries along `dim`."""
    shifts = torch.arange(0, 32, BITS, dtype=torch.int32, device=words.device)
    if dim == 0:
        nibbles = (words.unsqueeze(1) >> shifts.view(1, -1, 1)) & 15
        return nibbles.to(torch.uint8).flatten(0, 1)
    return ((words.unsqueeze(2) >> shifts) & 15).to(torch.uint8).flatten(1)


def pack(codes: Tensor, dim: int) -> Tensor:
    """The inverse of `unpack`."""
    parts = codes.unflatten(dim, (-1, PER_WORD)).long()
    shifts = torch.arange(0, 32, BITS, device=codes.device)
    words = (parts << (shifts.view(1, -1, 1) if dim == 0 else shifts)).sum(dim + 1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def version_of(zeros: Mapping[str, Tensor], label: str | None) -> Version:
    """The version of a model's stored zeros; the label decides where the zeros don't.

    Args:
        zeros: qzeros by layer. label: `checkpoint_format` of config.json.
    """
    found = {int(value) for words in zeros.values() for value in unpack(words, 1).unique()}
    if len(found) == 1 and next(iter(found)) in SYMMETRIC:
        return 2 if SYMMETRIC[next(iter(found))] == 2 else 1
    return 2 if label == "gptq_v2" else 1


class GptqLinear(nn.Module):
    """A linear over GPTQ's codes. Buffers: `qweight` int32 [K / 8, N], `zeros` uint8 [G, N],
    `scales` fp32 [N, G].
    """

    qweight: Tensor
    zeros: Tensor
    scales: Tensor

    def __init__(self, qweight: Tensor, zeros: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = qweight.shape[0] * PER_WORD, qweight.shape[1]
        self.register_buffer("qweight", qweight)
        self.register_buffer("zeros", zeros)
        self.register_buffer("scales", scales)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def codes(self) -> Tensor:
        return self.qweight

    def dequantized(self) -> Tensor:
        """[N, K] in the dtype of the scales."""
        codes = unpack(self.qweight, 0).view(len(self.zeros), -1, self.out_features)
        steps = codes.to(self.scales.dtype) - self.zeros.unsqueeze(1).to(self.scales.dtype)
        return (steps * self.scales.t().unsqueeze(1)).flatten(0, 1).t()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantized().to(x.dtype), self.bias)


class InOrder(nn.Module):
    """A layer that first puts its inputs into the order of its groups."""

    order: Tensor

    def __init__(self, order: Tensor, inner: GptqLinear) -> None:
        super().__init__()
        self.register_buffer("order", order)
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x[..., self.order])
        return result


def layer_from_state(
    name: str, state: Mapping[str, Tensor], bias: Tensor | None, version: Version
) -> nn.Module:
    """The layer of what `PARTS` are stored of it.

    Raises ModelError when they are missing or don't fit together.
    """
    try:
        qweight, stored, scales = (state[part] for part in PARTS[:3])
        groups, outputs = scales.shape
        inputs = qweight.shape[0] * PER_WORD
        g_idx = state.get("g_idx", torch.arange(inputs) * groups // inputs).long()
        if (
            qweight.shape[1] != outputs
            or stored.shape != (groups, outputs // PER_WORD)
            or len(g_idx) != inputs
        ):
            raise ValueError(
                f"qweight {tuple(qweight.shape)}, qzeros {tuple(stored.shape)}, scales "
                f"{tuple(scales.shape)}"
            )
        if not torch.equal(g_idx.sort().values, torch.arange(inputs) * groups // inputs):
            raise ValueError("groups of different sizes")
    except (KeyError, ValueError) as error:
        raise ModelError(
            f"{name} is no 4-bit GPTQ layer: {error}",
            "qweight, qzeros and scales of 4 bits",
            "quantize the model again",
        ) from None
    zeros = (unpack(stored, 1) + (1 if version == 1 else 0)) & 15
    live = scales.float().t().contiguous()
    order = g_idx.argsort(stable=True)
    if torch.equal(order, torch.arange(inputs)):
        return GptqLinear(qweight, zeros, live, bias)
    return InOrder(order, GptqLinear(pack(unpack(qweight, 0)[order], 0), zeros, live, bias))


def scales_to_store(scales: Tensor) -> Tensor:
    """[N, G] fp32 -> [G, N] as files have them."""
    return scales.t().contiguous()
