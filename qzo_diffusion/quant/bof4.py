"""Codebooks of BOF4 and BOF4-S (arXiv 2505.06653), computed for a block size.

A block of I weights is divided by its largest magnitude (BOF4), or by its weight of largest
magnitude with its sign (BOF4-S). The largest weight is then -1 or 1, or always 1. The other weights
are spread over (-1, 1) in a way that depends on I. The codebook has the least mean squared error of
weights from a normal distribution, where 0 and the largest weights are exact.

For the largest magnitude m of I normal weights, each of the others has the density φ(w) / (2Φ(m) -
1) on (-m, m). An error of x = w / m counts m². So the density that the entries serve is, up to a
constant,

    g(x) = ∫ q(m) m φ(x m) dm,    q(m) = m² φ(m) (2Φ(m) - 1)^(I - 2)

The paper draws samples. Here the integrals over x are exact, and the one over m is a sum. Entries
go to the means of their cells until they stay (Lloyd's algorithm)."""

import math
from functools import cache

import torch
from torch import Tensor

BELOW, ABOVE = 7, 8  # entries on each side of 0
LARGEST, POINTS = 9.0, 256  # of m: larger magnitudes have no weight in float64
ROUNDS, SETTLED = 5000, 1e-9
DIGITS = 6  # beyond them machines may differ, and codes must not


@cache
def codebook(blocksize: int, signed: bool) -> tuple[float, ...]:
    """The 16 entries in order, from -1 (BOF4) or above (BOF4-S, `signed`) to 1."""
    magnitudes = torch.linspace(0, LARGEST, POINTS + 1, dtype=torch.float64)[1:]
    others_are_less = torch.erf(magnitudes / math.sqrt(2)).pow(blocksize - 2)
    weights = magnitudes.square() * _density(magnitudes) * others_are_less
    negative = torch.linspace(-1, 0, BELOW + (2 if signed else 1), dtype=torch.float64)[:-1]
    positive = torch.linspace(0, 1, ABOVE + 1, dtype=torch.float64)
    entries = torch.cat([negative[1:] if signed else negative, positive])
    free = (entries != 0) & (entries.abs() != 1)
    for _ in range(ROUNDS):
        moved = torch.where(free, _means(entries, magnitudes, weights), entries)
        change = (moved - entries).abs().max().item()
        entries = moved
        if change < SETTLED:
            break
    return tuple(round(entry, DIGITS) for entry in entries.tolist())


def _means(entries: Tensor, magnitudes: Tensor, weights: Tensor) -> Tensor:
    """The mean of g over the numbers in (-1, 1) that are nearest to each entry."""
    one = entries.new_ones(1)
    edges = torch.cat([-one, (entries[1:] + entries[:-1]) / 2, one])
    reached = edges.unsqueeze(1) * magnitudes
    mass = torch.special.ndtr(reached).diff(dim=0)
    moment = -_density(reached).diff(dim=0) / magnitudes
    return (moment * weights).sum(1) / (mass * weights).sum(1)


def _density(x: Tensor) -> Tensor:
    """φ of a normal distribution."""
    return torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
