"""Turn a task and a folder of data into batches of tokens."""

from collections.abc import Callable, Sequence
from pathlib import Path

from qzo_diffusion.core.probing import StepBatch
from qzo_diffusion.llm.causal_lm import CausalLm
from qzo_diffusion.llm.kept_hidden import KeptHidden, fits
from qzo_diffusion.llm.tasks import Batch, Encoded, by_length, make_batch
from qzo_diffusion.train.batch_plan import BatchPlan

BATCHES_OF_A_LENGTH = 8  # several, so that every epoch mixes batches anew


class TextBatches:
    """The batch of any step, drawn from (seed, step) alone: texts of about equal length.

    Args:
        micro_batch_size: examples in one micro-batch; None is the whole batch.
        share: `batch_size` -> the slice of examples of this process.
        keep_in: a folder for the output of the untrained first blocks, which is then computed once
            for each text; None keeps nothing.
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
        keep_in: Path | None = None,
    ) -> None:
        groups = by_length(encoded, BATCHES_OF_A_LENGTH * batch_size)
        items = [(index, group) for group, indices in enumerate(groups) for index in indices]
        self._plan = BatchPlan(items, batch_size=batch_size, seed=seed)
        self._lm, self._encoded, self._share, self._micro_batch_size = (
            lm,
            encoded,
            share,
            micro_batch_size,
        )
        self._kept = (
            None if keep_in is None else _kept(lm, encoded, micro_batch_size or batch_size, keep_in)
        )

    def __call__(self, step: int) -> StepBatch[Batch]:
        chosen = [self._encoded[index] for index in self._plan.batch(step)]
        share = self._share(len(chosen))
        mine = chosen[share]
        size = self._micro_batch_size or len(mine)
        parts = [
            make_batch(self._lm, mine[start : start + size], self._kept)
            for start in range(0, len(mine), size)
        ]
        return StepBatch(parts, first_example=share.start or 0, examples=len(chosen))


def _kept(lm: CausalLm, encoded: Sequence[Encoded], size: int, folder: Path) -> KeptHidden | None:
    """Return None if the model has no part without probes, if there is no room, or if no file can
    be made.
    """
    groups = [
        [row for index in indices for row in encoded[index].rows]
        for indices in by_length(encoded, size)
    ]
    if lm.prefix is None:
        return None
    try:
        room = fits([row for group in groups for row in group], lm.bytes_of_token, folder)
        return KeptHidden(lm, groups, folder) if room else None
    except OSError:
        # such as a read-only home; everything is then computed anew
        return None


def evaluation_batches(lm: CausalLm, encoded: Sequence[Encoded], size: int) -> list[Batch]:
    """Return all examples, grouped by about equal length."""
    return [
        make_batch(lm, [encoded[index] for index in indices])
        for indices in by_length(encoded, size)
    ]
