"""SST-2 on a real pretrained language model, as a task of the convergence benchmark."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.smollm2 import smollm2
from qzo_diffusion.core.oracle import DifferentiableHandle
from qzo_diffusion.core.probing import StepBatch
from qzo_diffusion.core.scales import ScaleSet
from qzo_diffusion.diffusion.flow_matching import SigmaDistribution
from qzo_diffusion.llm.causal_lm import OUTPUT_HEAD, load_causal_lm
from qzo_diffusion.llm.data_files import find_data, read_rows
from qzo_diffusion.llm.objectives import mean_metric, task_loss
from qzo_diffusion.llm.task_file import read_task
from qzo_diffusion.llm.tasks import Batch, Encoded, choose_rows, encode, make_examples
from qzo_diffusion.quant.load import find_scales, handles_of, quantize_
from qzo_diffusion.runs.llm.batches import TextBatches, evaluation_batches

TRAIN, HELD_OUT = 1000, 200
# no sentence of the dev set is longer; a longer one to train on loses its beginning
MOST_TOKENS = 64
SPLIT_SEED = 0  # the same sentences for every seed of a run
# A third of fp32's time. At relative eps 1e-2 rounding adds an error of 0.25 (dense) to 0.46 (a
# direction per example) of the derivative, little beside what random directions add; at the
# absolute 1e-3 (0.2 % of these scales) it is 1.6: there pass float32.
DTYPE = torch.bfloat16


class TextTask:
    """SmolLM2-135M-Instruct in NF4, block 64, on the CPU; the template `It was`.

    1,000 sentences to train on; the held-out loss is that of 200 dev sentences, always the same.

    Args:
        data: the folder of train.tsv and dev.tsv.
        model: a transformers folder; the converted SmolLM2 where None, which is made when it isn't
            there.
    """

    def __init__(self, data: Path, dtype: torch.dtype = DTYPE, model: Path | None = None) -> None:
        self._spec, self._data = read_task("sst2"), data
        self._lm = load_causal_lm(model or smollm2(), dtype)
        quantize_(self._lm.model, quant_type="nf4", blocksize=64, skip=[OUTPUT_HEAD])
        self.model: nn.Module = self._lm.model
        self.token_wise: Sequence[str] = []  # an answer is one token: nothing to divide
        self.scales: ScaleSet = find_scales(self._lm.model)
        self._train = self._encoded(self._spec.train, TRAIN)
        self.held_out: Sequence[Batch] = evaluation_batches(
            self._lm, self._encoded(self._spec.test, HELD_OUT), size=20
        )

    def _encoded(self, files: Sequence[str], count: int | None) -> list[Encoded]:
        path = find_data(self._data, files)
        (rows,) = choose_rows(
            read_rows(path, self._spec.fields, self._spec.columns), [count], SPLIT_SEED, path.name
        )
        return encode(self._lm, make_examples(self._spec, rows), MOST_TOKENS)

    def objective(self, micro_batch: Batch) -> Tensor:
        return task_loss(self._lm, micro_batch)

    def batches(
        self, seed: int, batch: int, regions: int, sigma: SigmaDistribution
    ) -> Callable[[int], StepBatch[Batch]]:
        return TextBatches(self._lm, self._train, batch_size=batch, seed=seed)

    def handles(self) -> Iterable[DifferentiableHandle]:
        return handles_of(self._lm.model)

    def accuracy(self, count: int | None = None) -> float:
        """On the first `count` dev sentences of the fixed order, or on all of them, with the scales
        as they are shown.
        """
        batches = evaluation_batches(self._lm, self._encoded(self._spec.test, count), size=20)
        return mean_metric(self._lm, batches, self._spec)
