"""Choose the samples of each step's batch.

A batch is one tensor, so its samples share a bucket: pictures of one shape, or texts of about one
length. A `BatchPlan` is a function of (seed, step) alone. A resumed run gets the batches of the
uninterrupted one; there is no position to save and no global random state."""

import math
from collections.abc import Hashable, Sequence

import numpy as np


class BatchPlan:
    """Batches of sample indices by step: all of a batch share a bucket, and an epoch holds every
    sample.

    In an epoch each sample comes `repeats` times. Every batch has exactly `batch_size` items: where
    the samples of a bucket run out in its last batch, that bucket starts again from the first of
    the epoch's order, so fewer than `batch_size` extra items a bucket and an epoch. A lone sample
    in its bucket fills a batch by itself.

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

    def __init__(
        self, items: Sequence[tuple[int, Hashable]], *, batch_size: int, seed: int, repeats: int = 1
    ) -> None:
        if not items or batch_size < 1 or repeats < 1:
            raise ValueError(
                f"{len(items)} items, batch size {batch_size}, repeats {repeats}: all must be at "
                "least 1"
            )
        self.batch_size, self.seed, self.repeats = batch_size, seed, repeats
        self._by_bucket: dict[Hashable, list[int]] = {}
        for index, bucket in items:
            self._by_bucket.setdefault(bucket, []).append(index)
        self._latest: tuple[int, list[list[int]]] = (-1, [])

    @property
    def steps_per_epoch(self) -> int:
        return sum(
            math.ceil(len(own) * self.repeats / self.batch_size) for own in self._by_bucket.values()
        )

    def batch(self, step: int) -> list[int]:
        """The `batch_size` sample indices of a step, counted from 0; any step may be asked for at
        any time.
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._latest[0] != epoch:
            self._latest = (epoch, self.epoch(epoch))
        return list(self._latest[1][position])

    def epoch(self, epoch: int) -> list[list[int]]:
        """All batches of an epoch, in order."""
        # As uint64 from the start: numpy turns a list with numbers above 2**63 into floats, and
        # seeds would merge.
        bits = np.random.Philox(key=np.array([self.seed % 2**64, epoch], dtype=np.uint64))
        batches = [
            batch for own in self._by_bucket.values() for batch in self._bucket_batches(own, bits)
        ]
        return [batches[position] for position in _permutation(len(batches), bits)]

    def _bucket_batches(self, own: list[int], bits: np.random.Philox) -> list[list[int]]:
        # One permutation after another, not a shuffle of all repeats: a sample rarely meets itself
        # in a batch.
        order = [
            own[position] for _ in range(self.repeats) for position in _permutation(len(own), bits)
        ]
        starts = range(0, len(order), self.batch_size)
        return [
            [order[(start + offset) % len(order)] for offset in range(self.batch_size)]
            for start in starts
        ]


def _permutation(count: int, bits: np.random.Philox) -> list[int]:
    """A random order. From raw bits, since numpy keeps those for all versions, but not
    Generator.permutation.
    """
    order: list[int] = np.argsort(bits.random_raw(count), kind="stable").tolist()
    return order
