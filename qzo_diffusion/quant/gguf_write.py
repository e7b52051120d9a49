"""Write tuned factors into a copy of a GGUF file, and measure how much of a change the file keeps.

A factor is fp16, and its steps are 2^-11 to 2^-10 of itself. Rounded to the nearest number, a gain
of less than half a step is lost. Dithering carries what a block lost to the next block of its row,
so that a row's mean gain is kept; a single block is then off by up to a whole step."""

import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from qzo_diffusion.core.errors import OutputError
from qzo_diffusion.quant.entries import Entry, Span, bytes_of
from qzo_diffusion.quant.gguf import GgufLinear, Rounding, to_nearest

SMALLEST_NORMAL, STEP = 2.0**-14, 2.0**-11  # of fp16
GOLDEN = 0.6180339887498949
PART = 2**24  # bytes that are compared at once


@dataclass
class Kept:
    """What a file keeps of changes c = log(tuned / base), where it holds k = log(stored / base).

    `blocks` are sums over blocks of c·k and c·c, `rows` the same of the rows' means. changed:
    blocks whose factor differs from the base's.
    """

    blocks: list[float] = field(default_factory=lambda: [0.0, 0.0])
    rows: list[float] = field(default_factory=lambda: [0.0, 0.0])
    changed: int = 0
    count: int = 0

    def add(self, layer: GgufLinear, scales: Tensor, stored: Tensor) -> None:
        """Count a layer with these tuned scales, for which these bytes are written."""
        base, gains = layer.stored_scales(), layer.gains(scales)
        there = GgufLinear(stored.to(layer.codes.device), layer.kind, None, None).stored_scales()
        valid = (base > 0) & (gains > 0) & (there > 0)
        wanted = torch.where(valid, gains, 1.0).double().log()
        found = torch.where(valid, there / base, 1.0).double().log()
        for sums, c, k in (
            (self.blocks, wanted, found),
            (self.rows, wanted.mean(1), found.mean(1)),
        ):
            sums[0] += float((c * k).sum())
            sums[1] += float((c * c).sum())
        self.changed += int((found != 0).sum())
        self.count += found.numel()

    def facts(self) -> dict[str, float | None]:
        """Shares from 0 to 1; None where nothing was changed."""

        def share(sums: list[float]) -> float | None:
            return round(sums[0] / sums[1], 4) if sums[1] else None

        return {
            "change_kept": share(self.blocks),
            "row_change_kept": share(self.rows),
            "factors_changed": round(self.changed / max(1, self.count), 4),
        }


def dithered(factors: Tensor, gains: Tensor) -> Tensor:
    """factors · gains as fp16, so that the mean gain of each row is kept to a step over its blocks.

    Args:
        factors, gains: fp32 [N, blocks]. Rows of gains 1 and blocks of zeros stay as they are;
            numbers below fp16's normal range are rounded by themselves.
    """
    stored = to_nearest(factors, gains)
    # rows begin with different errors, or all would step up at the same blocks
    start = torch.arange(len(factors), device=factors.device, dtype=torch.float64)
    carry = ((start * GOLDEN) % 1.0 - 0.5).to(factors) * STEP * (gains != 1).any(1)
    for column in range(factors.shape[1]):
        old, wanted = factors[:, column], gains[:, column] + carry
        new = (old * wanted).half()
        normal = (old.abs() >= SMALLEST_NORMAL) & (new.float().abs() >= SMALLEST_NORMAL)
        stored[:, column] = torch.where(normal, new, stored[:, column])
        carry = torch.where(normal, wanted - new.float() / old, carry)
    return stored


def write_tuned(
    source: Path,
    target: Path,
    layers: Mapping[str, tuple[Entry, GgufLinear, Tensor]],
    rounding: Rounding = to_nearest,
    progress: Callable[[int], object] = lambda nbytes: None,
) -> Kept:
    """Copy `source` to `target` with the factors of tuned scales; no other byte changes.

    The copy is read back: what lies between the layers is compared with the source, and the layers
    with what was written.

    Args:
        layers: by name, the place of a layer in the file, the layer, and its tuned scales.

    Raises:
        ModelError: a scale beyond the range of fp16.
        OutputError: the copy reads back different.
    """
    kept, sums = Kept(), dict[str, int]()
    shutil.copyfile(source, target)
    with target.open("r+b") as output:
        for name, (entry, layer, scales) in layers.items():
            stored = layer.bytes_to_store(scales, rounding)
            kept.add(layer, scales, stored)
            left = bytes_of(stored.cpu().contiguous())
            sums[name] = zlib.crc32(left)
            for span in entry.spans:
                output.seek(span.start)
                output.write(left[: span.size])
                left = left[span.size :]
            progress(entry.nbytes)
    _compare(source, target, {name: entry for name, (entry, _, _) in layers.items()}, sums)
    return kept


def _compare(
    source: Path, target: Path, entries: Mapping[str, Entry], sums: Mapping[str, int]
) -> None:
    size = source.stat().st_size
    places = sorted((span.start, span.size) for entry in entries.values() for span in entry.spans)
    same, end = target.stat().st_size == size, 0
    for start, length in [*places, (size, 0)]:
        same = same and _equal(Span(source, end, start - end), target)
        end = start + length
    for name, entry in entries.items():
        found = 0
        for span in entry.spans:
            found = zlib.crc32(_bytes(Span(target, span.start, span.size)), found)
        same = same and found == sums[name]
    if not same:
        raise OutputError(
            f"{target.name} is not what was written", "the same bytes", "check the disk, try again"
        )


def _equal(span: Span, other: Path) -> bool:
    return all(
        _bytes(Span(span.file, start, min(PART, span.start + span.size - start)))
        == _bytes(Span(other, start, min(PART, span.start + span.size - start)))
        for start in range(span.start, span.start + span.size, PART)
    )


def _bytes(span: Span) -> bytes:
    with span.file.open("rb") as handle:
        handle.seek(span.start)
        return handle.read(span.size)
