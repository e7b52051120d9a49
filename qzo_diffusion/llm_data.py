"""From a task and a folder of data to batches of tokens."""

from collections.abc import Callable, Sequence

from qzo_diffusion.llm.causal_lm import CausalLm
from qzo_diffusion.llm.tasks import Batch, Encoded, by_length, make_batch
from qzo_diffusion.train.batch_plan import BatchPlan
from qzo_diffusion.train.loop import StepBatch

BATCHES_OF_A_LENGTH = 8  # so that a batch is still mixed afresh in every epoch


class TextBatches:
    """The batch of any step, drawn from (seed, step) alone: texts of about one length.

    Args:
        micro_batch_size: examples in one micro-batch; None is the whole batch.
        share: which of `batch_size` examples are this process's.
    """

    def __init__(
        self,
        lm: CausalLm,
        encoded: Sequence[Encoded],
        *,
        batch_size: int,
        seed: int,
        micro_batch_size: int | None = None,
        share: Callable[[int], slice] = slice,
    ) -> None:
        groups = by_length(encoded, BATCHES_OF_A_LENGTH * batch_size)
        items = [(index, group) for group, indices in enumerate(groups) for index in indices]
        self._plan = BatchPlan(items, batch_size=batch_size, seed=seed)
        self._lm, self._encoded, self._share, self._micro_batch_size = lm, encoded, share, micro_batch_size

    def __call__(self, step: int) -> StepBatch[Batch]:
        chosen = [self._encoded[index] for index in self._plan.batch(step)]
        share = self._share(len(chosen))
        mine = chosen[share]
        size = self._micro_batch_size or len(mine)
        parts = [make_batch(self._lm, mine[start : start + size]) for start in range(0, len(mine), size)]
        return StepBatch(parts, first_example=share.start or 0, examples=len(chosen))


def evaluation_batches(lm: CausalLm, encoded: Sequence[Encoded], size: int) -> list[Batch]:
    """All examples, those of about one length together."""
    return [make_batch(lm, [encoded[index] for index in indices]) for indices in by_length(encoded, size)]
