"""Random signs as packed bits, eight a byte, unpacked layer by layer: to the same bits on a CPU and
on a GPU.

`core.noise` draws the bits. Only bits are kept and sent to a GPU; unpacked to fp32 they take 32
times as many bytes."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qzo_diffusion.core.precision import where_float64_is

PackedBits = NDArray[np.uint8]
_BITS_OF_BYTE = np.unpackbits(
    np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"
).astype(bool)
_SIGNS_OF_BYTE = np.where(_BITS_OF_BYTE, 1.0, -1.0).T  # [8, 256]


def to_device(packed: PackedBits, device: torch.device) -> Tensor:
    """Send packed bits to a device, for a GPU from pinned memory: no wait for what is queued."""
    bits = torch.from_numpy(np.ascontiguousarray(packed))
    return (
        bits.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda"
        else bits.to(device)
    )


def exp_pair(radius: float) -> tuple[float, float]:
    """exp(±radius), infinite where no number holds it: the losses of such a step tell of it."""
    plus, minus = (math.exp(one) if one < 709 else math.inf for one in (radius, -radius))
    return plus, minus


def select(
    packed: Tensor,
    pairs: Sequence[tuple[float, float]],
    dtype: torch.dtype,
    start: int = 0,
    stop: int | None = None,
) -> Tensor:
    """Choose one of two constants by each bit: uint8 [..., bytes] -> [pairs, ..., stop - start].

    Args:
        pairs: (if set, if clear).
        start, stop: the range of bits.
    """
    stop = 8 * packed.shape[-1] if stop is None else stop
    packed, skipped = packed[..., start // 8 : (stop + 7) // 8], start - start % 8
    chosen = torch.empty(len(pairs), *packed.shape, 8, dtype=dtype, device=packed.device)
    (_choose_by_table if packed.device.type == "cpu" else _choose_by_mask)(packed, pairs, chosen)
    return chosen.flatten(-2)[..., start - skipped : stop - skipped]


def _choose_by_table(packed: Tensor, pairs: Sequence[tuple[float, float]], into: Tensor) -> None:
    """Look up eight elements for each byte: on a CPU ten times faster than unpacking bits."""
    for pair, part in zip(pairs, into, strict=True):
        # in any other mode numpy fills a buffer and copies it
        np.take(
            _table(pair, into.dtype).numpy(), packed.numpy(), axis=0, out=part.numpy(), mode="clip"
        )


def _choose_by_mask(packed: Tensor, pairs: Sequence[tuple[float, float]], into: Tensor) -> None:
    """Test each bit: on a GPU ten times faster than a table."""
    is_set = (packed.unsqueeze(-1) & _masks(packed.device)).bool()
    for pair, part in zip(pairs, into, strict=True):
        torch.where(
            is_set, *(_constant(value, into.dtype, packed.device) for value in pair), out=part
        )


@lru_cache(maxsize=16)
def _table(pair: tuple[float, float], dtype: torch.dtype) -> Tensor:
    """[256, 8]: the constants that the bits of each byte choose."""
    return torch.from_numpy(np.where(_BITS_OF_BYTE, *pair)).to(dtype)


@lru_cache(maxsize=4)
def _masks(device: torch.device) -> Tensor:
    return torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8).to(device)


@lru_cache(maxsize=16)
def _constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A scalar tensor made on the device: sending it would wait for what is queued there."""
    return torch.full((), value, dtype=dtype, device=device)


_SUM_BITS = 39  # of an amount; with 2^13 amounts a sum has 52, which float64 holds exactly


def signed_sum(packed: Tensor, amounts: Sequence[float], numel: int) -> Tensor:
    """Σ amounts[i] · z_i for the packed signs z [n, bytes]: float64 [numel], on the bits' device
    or, where that has no float64, on the CPU.

    Amounts are rounded to whole multiples of a power of two, 2^-39 of the largest, so the sums are
    exact: the same on every machine, in any order, with any number of threads.
    """
    packed = where_float64_is(packed)
    largest, device = max(map(abs, amounts)), packed.device
    total = torch.zeros(numel, dtype=torch.float64, device=device)
    if largest == 0:
        return total
    unit = 2.0 ** (math.frexp(largest)[1] - _SUM_BITS)
    whole = [float(round(amount / unit)) for amount in amounts]
    (_sum_by_table_ if device.type == "cpu" else _sum_by_product_)(packed, whole, total)
    return total * unit


def _sum_by_product_(packed: Tensor, whole: Sequence[float], into: Tensor) -> None:
    """Add Σ whole[i] · z_i to `into` [numel] by matrix products, in parts: all signs would take 64
    times the memory of their bits.
    """
    amounts = torch.tensor(whole, dtype=torch.float64).to(into.device)
    for first in range(0, len(into), 2**17):
        place = slice(first, min(first + 2**17, len(into)))
        for part in (slice(start, start + 32) for start in range(0, len(whole), 32)):
            into[place] += (
                amounts[part]
                @ select(packed[part], [(1.0, -1.0)], torch.float64, place.start, place.stop)[0]
            )


def _sum_by_table_(packed: Tensor, whole: Sequence[float], into: Tensor) -> None:
    """Write Σ whole[i] · z_i into `into` [numel] by look-ups, the faster way on a CPU.

    The signs of eight amounts are a byte, which selects one of 256 sums.
    """
    rows = packed.numpy()
    missing = -len(whole) % 8  # rows with amount 0
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
