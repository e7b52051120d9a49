"""AQLM's format (arXiv 2401.06118), read and dequantized here: a weight is a sum of vectors from
codebooks times its row's scale.

    w[o, 8 j .. 8 j + 7] = scales[o] · Σ_c codebooks[c, codes[o, j, c]]

    codes     int8 or int16 [N, K / 8, C]   unsigned numbers of 8 or 16 bits in a signed type
    codebooks [C, 2^bits, 1, 8]
    scales    [N, 1, 1, 1]

Each row has one scale, so the output is multiplied in fp32. Rounding of weights can't hide a small
change there. The package's own CPU layer is not used. It transposes `codes` for good in its first
forward, and a model saved after that can't be loaded.
"""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from qzo_diffusion.core.errors import ModelError

PARTS = ("codes", "codebooks", "scales")
STORED = "scales"  # the part that is trained


class AqlmLinear(nn.Module):
    """A linear over AQLM's codes. Buffers: `codes` and `codebooks` as stored, `scales` fp32 [N]."""

    codes: Tensor
    codebooks: Tensor
    scales: Tensor

    def __init__(
        self, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = codes.shape[0], codes.shape[1] * codebooks.shape[3]
        self.register_buffer("codes", codes)
        self.register_buffer("codebooks", codebooks)
        self.register_buffer("scales", scales)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def unscaled(self) -> Tensor:
        """[N, K] in the dtype of the codebooks."""
        entries = self.codebooks.shape[1]
        total = self.codebooks.new_zeros(self.out_features, self.in_features)
        for index, book in enumerate(self.codebooks):
            places = self.codes[..., index].long() & (entries - 1)
            total = total + F.embedding(places, book.flatten(1)).flatten(1)
        return total

    def dequantized(self) -> Tensor:
        """[N, K] fp32."""
        return self.unscaled().float() * self.scales.unsqueeze(1)

    def forward(self, x: Tensor) -> Tensor:
        product = F.linear(x, self.unscaled().to(x.dtype)).to(self.scales.dtype) * self.scales
        return (product if self.bias is None else product + self.bias.to(product.dtype)).to(x.dtype)


def layer_from_state(name: str, state: Mapping[str, Tensor], bias: Tensor | None) -> AqlmLinear:
    """The layer of what `PARTS` are stored of it.

    Raises ModelError when they are missing or don't fit together.
    """
    try:
        codes, codebooks, scales = (state[part] for part in PARTS)
        books, entries, outputs_a_group, _ = codebooks.shape
        whole = codes.dim() == 3 and codes.shape[2] == books and scales.numel() == len(codes)
        if not whole or outputs_a_group != 1 or entries & (entries - 1):
            raise ValueError(
                f"codes {tuple(codes.shape)}, codebooks {tuple(codebooks.shape)}, scales "
                f"{tuple(scales.shape)}"
            )
    except (KeyError, ValueError) as error:
        raise ModelError(
            f"{name} is no AQLM layer: {error}",
            "codes, codebooks and a scale for every output",
            "download the model again",
        ) from None
    return AqlmLinear(codes, codebooks, scales.detach().float().flatten(), bias)


def scales_to_store(scales: Tensor) -> Tensor:
    """[N] -> [N, 1, 1, 1] as files have them."""
    return scales.view(-1, 1, 1, 1)
