"""Packed signs, eight a byte, made into numbers where they are needed: on a CPU or on a GPU, to the
same bits.

Which bits these are says `core.noise`. Only bits are kept and sent; the numbers, 32 times as many
bytes, are made layer by layer."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PackedBits = NDArray[np.uint8]
_BITS_OF_BYTE = np.unpackbits(
    np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"
).astype(bool)
_SIGNS_OF_BYTE = np.where(_BITS_OF_BYTE, 1.0, -1.0).T  # [8, 256]


def to_device(packed: PackedBits, device: torch.device) -> Tensor:
    """From memory that a GPU reads by itself: else the processor would wait for all that is queued
    there.
    """
    bits = torch.from_numpy(np.ascontiguousarray(packed))
    return (
        bits.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda"
        else bits.to(device)
    )


def select(
    packed: Tensor,
    pairs: Sequence[tuple[float, float]],
    dtype: torch.dtype,
    start: int = 0,
    stop: int | None = None,
) -> Tensor:
    """uint8 [..., bytes] -> [pairs, ..., stop - start], where the bits are: one of two constants a
    bit.

    `pairs` are (if set, if clear).
    """
    stop = 8 * packed.shape[-1] if stop is None else stop
    packed, skipped = packed[..., start // 8 : (stop + 7) // 8], start - start % 8
    chosen = torch.empty(len(pairs), *packed.shape, 8, dtype=dtype, device=packed.device)
    (_choose_by_table if packed.device.type == "cpu" else _choose_by_mask)(packed, pairs, chosen)
    return chosen.flatten(-2)[..., start - skipped : stop - skipped]


def _choose_by_table(packed: Tensor, pairs: Sequence[tuple[float, float]], into: Tensor) -> None:
    """Eight numbers for a byte at once: on a CPU ten times faster than unpacking the bits, on a GPU
    ten times slower.
    """
    for pair, part in zip(pairs, into, strict=True):
        # in any other mode numpy fills a buffer and copies it
        np.take(
            _table(pair, into.dtype).numpy(), packed.numpy(), axis=0, out=part.numpy(), mode="clip"
        )


def _choose_by_mask(packed: Tensor, pairs: Sequence[tuple[float, float]], into: Tensor) -> None:
    is_set = (packed.unsqueeze(-1) & _masks(packed.device)).bool()
    for pair, part in zip(pairs, into, strict=True):
        torch.where(
            is_set, *(_constant(value, into.dtype, packed.device) for value in pair), out=part
        )


@lru_cache(maxsize=16)
def _table(pair: tuple[float, float], dtype: torch.dtype) -> Tensor:
    """[256, 8]: what the bits of each byte choose."""
    return torch.from_numpy(np.where(_BITS_OF_BYTE, *pair)).to(dtype)


@lru_cache(maxsize=4)
def _masks(device: torch.device) -> Tensor:
    return torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8).to(device)


@lru_cache(maxsize=16)
def _constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[], made where it is needed: sending it would wait for all that is queued."""
    return torch.full((), value, dtype=dtype, device=device)


_SUM_BITS = 39  # of an amount; with 2^13 amounts a sum has 52, which float64 holds exactly


def signed_sum(packed: Tensor, amounts: Sequence[float], numel: int) -> Tensor:
    """Σ amounts[i] · z_i for the signs z of packed [n, bytes]: float64 [numel], where the bits are.

    Amounts are rounded to whole multiples of a power of two, 2^-39 of the largest, so the sums are
    exact: the same on every machine, in any order, with any number of threads, whoever forms them.
    """
    largest, device = max(map(abs, amounts)), packed.device
    total = torch.zeros(numel, dtype=torch.float64, device=device)
    if largest == 0:
        return total
    unit = 2.0 ** (math.frexp(largest)[1] - _SUM_BITS)
    whole = [float(round(amount / unit)) for amount in amounts]
    (_sum_by_table_ if device.type == "cpu" else _sum_by_product_)(packed, whole, total)
    return total * unit


def _sum_by_product_(packed: Tensor, whole: Sequence[float], into: Tensor) -> None:
    """Some at a time: the signs of all would take 64 times the memory of their bits."""
    amounts = torch.tensor(whole, dtype=torch.float64).to(into.device)
    for first in range(0, len(into), 2**17):
        place = slice(first, min(first + 2**17, len(into)))
        for part in (slice(start, start + 32) for start in range(0, len(whole), 32)):
            into[place] += (
                amounts[part]
                @ select(packed[part], [(1.0, -1.0)], torch.float64, place.start, place.stop)[0]
            )


def _sum_by_table_(packed: Tensor, whole: Sequence[float], into: Tensor) -> None:
    """Eight amounts at once: their signs for a number, put into a byte, say which of 256 sums it
    gets. On a CPU the faster way.
    """
    rows = packed.numpy()
    missing = -len(whole) % 8  # rows of no amount
    sums = np.pad(np.array(whole), (0, missing)).reshape(-1, 8) @ _SIGNS_OF_BYTE
    for first in range(0, rows.shape[1], 2**10):  # bytes; 2 MB for 2,048 amounts
        part = np.pad(rows[:, first : first + 2**10], ((0, missing), (0, 0)))
        totals = np.zeros(8 * part.shape[1])
        for table, codes in zip(sums, _turned(part), strict=True):
            totals += np.take(table, codes, mode="clip")
        place = into[8 * first : 8 * first + len(totals)]
        place.copy_(torch.from_numpy(totals[: len(place)]))


def _turned(packed: PackedBits) -> PackedBits:
    """[8 n, bytes], a bit a number -> [n, 8 · bytes], a byte a number with its bits of eight rows,
    the first the lowest.

    Each square of eight bits by eight is one word, turned by exchanging ever larger squares in it
    (Warren, Hacker's Delight, 7-3)."""
    squares = np.ascontiguousarray(packed.reshape(-1, 8, packed.shape[1]).transpose(0, 2, 1))
    words = squares.view("<u8")[..., 0]
    for shift, mask in (
        (7, 0x00AA00AA00AA00AA),
        (14, 0x0000CCCC0000CCCC),
        (28, 0x00000000F0F0F0F0),
    ):
        moved = (words ^ (words >> np.uint64(shift))) & np.uint64(mask)
        words = words ^ moved ^ (moved << np.uint64(shift))
    return words.astype("<u8", copy=False).view(np.uint8).reshape(len(words), -1)
