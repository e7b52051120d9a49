"""Quantize weights to ggml's blocks of 256, Q4_K and Q5_K, which the package gguf only reads.

    w = d · scale · q - dmin · minimum

A block has eight parts of 32 weights; `scale` and `minimum` of a part are 6-bit numbers, `d` and
`dmin` fp16 numbers of the block, q has 4 or 5 bits. Each part's line from its smallest to its
largest weight gives scale and minimum; then a least-squares step fits them to the codes."""

import torch
from torch import Tensor

PARTS, WIDTH, SIX_BITS = 8, 32, 63
BITS = {"Q4_K": 4, "Q5_K": 5}
ROUNDS = 3  # of fitting; more change little


def quantize_k(weight: Tensor, kind: str) -> Tensor:
    """fp32 [N, K] -> uint8 [N, bytes of a row]; K is a multiple of 256."""
    parts = weight.reshape(-1, PARTS, WIDTH)
    largest = 2 ** BITS[kind] - 1
    scale, minimum = _fitted(parts, largest)
    d, scales = _six_bits(scale)
    dmin, minimums = _six_bits(minimum)
    step = (d.float() * scales).unsqueeze(-1)
    shift = (dmin.float() * minimums).unsqueeze(-1)
    # a part of equal weights has no step, and its codes do not matter
    codes = _codes(parts, step, shift, largest).to(torch.uint8)
    fields = [d.view(torch.uint8), dmin.view(torch.uint8), _packed_scales(scales, minimums)]
    if kind == "Q5_K":
        fields.append(_high_bits(codes))
    pairs = (codes & 15).view(-1, PARTS // 2, 2, WIDTH)
    fields.append((pairs[:, :, 0] | pairs[:, :, 1] << 4).flatten(1))
    return torch.cat(fields, 1).view(len(weight), -1)


def _codes(parts: Tensor, step: Tensor, shift: Tensor, largest: int) -> Tensor:
    safe = torch.where(step == 0, 1.0, step)
    return torch.where(step == 0, 0.0, ((parts + shift) / safe).round().clamp(0, largest))


def _fitted(parts: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Scale and minimum of each part, both not negative, [blocks, 8]."""
    minimum = (-parts.amin(-1)).clamp(min=0)
    scale = (parts.amax(-1) + minimum).clamp(min=0) / largest
    for _ in range(ROUNDS):
        codes = _codes(parts, scale.unsqueeze(-1), minimum.unsqueeze(-1), largest)
        mean, of_codes = parts.mean(-1), codes.mean(-1)
        spread = (codes - of_codes.unsqueeze(-1)).square().mean(-1)
        joint = ((codes - of_codes.unsqueeze(-1)) * parts).mean(-1)
        slope = torch.where(spread > 0, joint / spread.clamp(min=1e-30), scale)
        offset = slope * of_codes - mean
        better = (slope > 0) & (offset >= 0)
        scale, minimum = torch.where(better, slope, scale), torch.where(better, offset, minimum)
    return scale, minimum


def _six_bits(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers [blocks, 8] -> their factor fp16 [blocks, 1], and 6-bit numbers uint8 [blocks, 8]."""
    factor = (numbers.amax(1, keepdim=True) / SIX_BITS).half()
    safe = torch.where(factor == 0, 1.0, factor.float())
    return factor, (numbers / safe).round().clamp(0, SIX_BITS).to(torch.uint8)


def _packed_scales(scales: Tensor, minimums: Tensor) -> Tensor:
    """6-bit numbers of eight parts in 12 bytes: four parts whole, the high bits of the others above
    them.
    """
    low, high = scales[:, :4] | (scales[:, 4:] >> 4) << 6, minimums[:, :4]
    high = high | (minimums[:, 4:] >> 4) << 6
    return torch.cat([low, high, (scales[:, 4:] & 15) | (minimums[:, 4:] & 15) << 4], 1)


def _high_bits(codes: Tensor) -> Tensor:
    """The fifth bits: bit p of byte i is that of weight i of part p."""
    bits = codes.view(-1, PARTS, WIDTH) >> 4
    places = torch.arange(PARTS, dtype=torch.uint8).view(1, -1, 1)
    return (bits << places).sum(1, dtype=torch.int64).to(torch.uint8)
