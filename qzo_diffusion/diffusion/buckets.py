"""Aspect-ratio buckets, and which samples make up the batch of a step.

Images keep about their own proportions: each goes to the nearest of nine shapes of equal area. A batch is a single
tensor, so all its samples share a shape.

A `BatchPlan` is a function of (seed, step) and nothing else. A resumed run asks it for the next step and gets what the
uninterrupted run would have got; there is no position to save and no global random state.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np

from qzo_diffusion.core.errors import ConfigError

Bucket = tuple[int, int]
"""(width, height) in pixels, both multiples of 16: the VAE shrinks by 8 and the transformer takes patches of 2."""

STRIDE = 16
_WIDE_SHAPES_AT_1024 = ((1152, 896), (1216, 832), (1344, 768), (1472, 704))
# At low resolutions rounding to 16 bends some shapes far from the area asked for; those are left out.
_AREA_TOLERANCE = 0.25


@functools.cache
def bucket_shapes(resolution: int) -> tuple[Bucket, ...]:
    """The shapes for a resolution, the square first; at 1024 those that Stable Diffusion 3.5 was trained on.

    Raises:
        ConfigError: the resolution is below 16.
    """
    if resolution < STRIDE:
        raise ConfigError(f"a resolution of {resolution}", f"at least {STRIDE} pixels", "raise data.resolution")
    square = _rounded(resolution)
    shapes = [(square, square)]
    for width_at_1024, height_at_1024 in _WIDE_SHAPES_AT_1024:
        width, height = _rounded(width_at_1024 * resolution / 1024), _rounded(height_at_1024 * resolution / 1024)
        if abs(width * height / square**2 - 1) <= _AREA_TOLERANCE:
            shapes += [(width, height), (height, width)]
    return tuple(dict.fromkeys(shapes))


def nearest_bucket(width: int, height: int, resolution: int) -> Bucket:
    """The shape whose proportions are nearest to width : height, by their ratio. No image is refused.

    Raises:
        ConfigError: as `bucket_shapes`.
    """
    aspect = math.log(width / height)
    return min(bucket_shapes(resolution), key=lambda shape: abs(aspect - math.log(shape[0] / shape[1])))


def _rounded(pixels: float) -> int:
    return max(STRIDE, round(pixels / STRIDE) * STRIDE)


class BatchPlan:
    """Batches of sample indices by step: all of a batch share a bucket, and an epoch holds every sample.

    In an epoch each sample comes `repeats` times. Every batch has exactly `batch_size` items: where the samples of a
    bucket run out in its last batch, that bucket starts again from the first of the epoch's order, so fewer than
    `batch_size` extra items a bucket and an epoch. A lone image in its bucket fills a batch by itself.

    Args:
        items: (sample index, bucket) of every sample.
        repeats: how often each sample comes in an epoch; 1 means once.

    Raises:
        ValueError: no items, or a batch size or repeats below 1.

    Example:
        >>> plan = BatchPlan([(0, (64, 64)), (1, (64, 64))], batch_size=2, seed=0)
        >>> sorted(plan.batch(step=1_000_000))
        [0, 1]
    """

    def __init__(self, items: Sequence[tuple[int, Bucket]], *, batch_size: int, seed: int, repeats: int = 1) -> None:
        if not items or batch_size < 1 or repeats < 1:
            raise ValueError(f"{len(items)} items, batch size {batch_size}, repeats {repeats}: all must be at least 1")
        self.batch_size, self.seed, self.repeats = batch_size, seed, repeats
        self._by_bucket: dict[Bucket, list[int]] = {}
        for index, bucket in items:
            self._by_bucket.setdefault(bucket, []).append(index)
        self._latest: tuple[int, list[list[int]]] = (-1, [])

    @property
    def steps_per_epoch(self) -> int:
        return sum(math.ceil(len(own) * self.repeats / self.batch_size) for own in self._by_bucket.values())

    def batch(self, step: int) -> list[int]:
        """The `batch_size` sample indices of a step, counted from 0; any step may be asked for at any time."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._latest[0] != epoch:
            self._latest = (epoch, self.epoch(epoch))
        return list(self._latest[1][position])

    def epoch(self, epoch: int) -> list[list[int]]:
        """All batches of an epoch, in order."""
        # As uint64 from the start: numpy turns a list with numbers above 2**63 into floats, and seeds would merge.
        bits = np.random.Philox(key=np.array([self.seed % 2**64, epoch], dtype=np.uint64))
        batches = [batch for own in self._by_bucket.values() for batch in self._bucket_batches(own, bits)]
        return [batches[position] for position in _permutation(len(batches), bits)]

    def _bucket_batches(self, own: list[int], bits: np.random.Philox) -> list[list[int]]:
        # One permutation after another, not a shuffle of all repeats: a sample rarely meets itself in a batch.
        order = [own[position] for _ in range(self.repeats) for position in _permutation(len(own), bits)]
        starts = range(0, len(order), self.batch_size)
        return [[order[(start + offset) % len(order)] for offset in range(self.batch_size)] for start in starts]


def _permutation(count: int, bits: np.random.Philox) -> list[int]:
    """A random order. From raw bits, since numpy keeps those for all versions, but not Generator.permutation."""
    order: list[int] = np.argsort(bits.random_raw(count), kind="stable").tolist()
    return order
