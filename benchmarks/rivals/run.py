"""A run of a rival on SST-2: the data, the batches and the evaluation of `benchmarks.llm_compare`.

All quantizable linears are trained, as by its first-order methods, and products are in bfloat16."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.llm_compare.methods import BATCH, BFLOAT16, TASKS, Places
from benchmarks.resident import peak_of, resident
from benchmarks.rivals.methods import LR, METHODS
from qzo_diffusion.config.defaults import set_dotted
from qzo_diffusion.config.files import make_config, parse_override
from qzo_diffusion.config.llm import LlmConfig
from qzo_diffusion.core.optimizer import make_schedule
from qzo_diffusion.core.spsa import mean_loss
from qzo_diffusion.llm.causal_lm import CausalLm, load_causal_lm
from qzo_diffusion.llm.objectives import mean_metric, task_loss
from qzo_diffusion.llm.tasks import Batch, encode
from qzo_diffusion.quant.base import linears_to_quantize
from qzo_diffusion.runs.llm import plan as llm_run
from qzo_diffusion.runs.llm.batches import TextBatches, evaluation_batches

STEPS, SEED = 32, 0  # half of the sentences once


class Task:
    """The model and the batches of a run."""

    def __init__(self, places: Places) -> None:
        settings: dict[str, Any] = {"task": "sst2", "model": str(places.model), "method": "mezo"}
        data = f"data.dir={places.data / TASKS['sst2']['dir']}"
        for text in [*TASKS["sst2"]["settings"], *BFLOAT16, data]:
            set_dotted(settings, *parse_override(text, LlmConfig))
        plan = llm_run.make_plan(make_config(settings, LlmConfig))
        self.spec, most = plan.spec, plan.config.data.max_tokens
        self.lm: CausalLm = load_causal_lm(plan.model_folder, plan.dtype)
        self.names = [
            name for name, _ in linears_to_quantize(self.lm.model, plan.config.quant.skip, 1)
        ]
        lm, splits = self.lm, plan.splits
        self.batches = TextBatches(lm, encode(lm, splits.train, most), batch_size=BATCH, seed=SEED)
        self.held_out = evaluation_batches(lm, encode(lm, splits.validation, most), BATCH)
        self.test = evaluation_batches(lm, encode(lm, splits.test, most), BATCH)

    def loss(self, batch: Batch) -> torch.Tensor:
        return task_loss(self.lm, batch)

    def batch(self, step: int) -> Batch:
        return self.batches(step).micro_batches[0]

    @torch.no_grad()
    def held_out_loss(self) -> float:
        return mean_loss(self.loss, self.held_out)

    def accuracy(self) -> float:
        return mean_metric(self.lm, self.test, self.spec)


def train(name: str, places: Places) -> dict[str, Any]:
    """The result of a run, in the words of `benchmarks.llm_compare`'s cells."""
    began, task, steps = time.process_time(), Task(places), places.steps or STEPS
    step_ = METHODS[name](task.lm.model, task.names, SEED)
    schedule = make_schedule("linear", LR[name], steps)
    for step in range(steps):
        step_(task.loss(task.batch(step)).mean(), schedule(step))
    return {
        "task": "sst2",
        "method": name,
        "seed": SEED,
        "metric": task.spec.metric,
        "value": task.accuracy(),
        "test_examples": sum(map(len, task.test)),
        "validation_loss": {"end": task.held_out_loss()},
        "steps": steps,
        "forwards": steps * BATCH,
        "lr": LR[name],
        "processor_seconds": round(time.process_time() - began, 1),
    }


def memory(name: str, places: Places) -> dict[str, float]:
    """Peaks of a step and of inference with the model as it was, above the imports, in MB."""
    import bitsandbytes  # noqa: F401  before the first look at the memory
    from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401

    imports = resident("VmRSS")
    task = Task(places)
    two = [task.batch(step) for step in range(2)]
    at_rest = peak_of(lambda: _inference(task, two)) - imports
    step_ = METHODS[name](task.lm.model, task.names, SEED)
    step = peak_of(lambda: _steps(step_, task, two)) - imports
    return {
        "inference_mb": round(at_rest / 1e6),
        "step_mb": round(step / 1e6),
        "memory_over_inference": round(step / at_rest, 4),
    }


def _inference(task: Task, batches: Sequence[Batch]) -> None:
    with torch.no_grad():
        mean_loss(task.loss, batches)


def _steps(
    step_: Callable[[torch.Tensor, float], None], task: Task, batches: Sequence[Batch]
) -> None:
    for batch in batches:
        step_(task.loss(batch).mean(), 1e-6)
