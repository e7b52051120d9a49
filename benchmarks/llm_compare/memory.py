"""Peaks of a step and of inference, each method in a process of its own: peaks must not hide one
another.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.llm_compare.methods import BATCH, METHODS, TASKS, Places
from benchmarks.resident import FREED_AT_ONCE

MEASURED = ("default", "paper", "mezo", "fo_scales", "qlora", "adamw")


def measure_all(places: Places) -> dict[str, Any]:
    found = {}
    for name in MEASURED:
        command = [
            sys.executable,
            "-m",
            "benchmarks.llm_compare",
            "memory",
            "--method",
            name,
            "--data",
            str(places.data),
        ]
        command += ["--model", str(places.model)]
        output = subprocess.run(
            command, check=True, capture_output=True, text=True, env=os.environ | FREED_AT_ONCE
        ).stdout
        found[name] = json.loads(output.splitlines()[-1])
        print(name, found[name], file=sys.stderr)
    return found


def measure(name: str, places: Places) -> dict[str, float]:
    """Peaks of a step and of inference on the same batch of SST-2, above what the process held
    after its imports, in MB.
    """
    import bitsandbytes  # noqa: F401  before the first look at the memory, as all that is imported on use elsewhere
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401

    from benchmarks.resident import peak_of, resident
    from qzo_diffusion.config.defaults import set_dotted
    from qzo_diffusion.config.files import make_config, parse_override
    from qzo_diffusion.config.llm import LlmConfig
    from qzo_diffusion.core.spsa import mean_loss
    from qzo_diffusion.llm.objectives import task_loss
    from qzo_diffusion.llm.tasks import Batch, encode
    from qzo_diffusion.runs import build
    from qzo_diffusion.runs.llm import plan as llm_run
    from qzo_diffusion.runs.llm.batches import TextBatches
    from qzo_diffusion.runs.llm.methods import load_base
    from qzo_diffusion.train.loop import Setup, train

    imports = resident("VmRSS")
    method = METHODS["zero_shot" if name == "adamw" else name]
    settings: dict[str, Any] = {"task": "sst2", "model": str(places.model), "method": method.method}
    # As many sentences in flight as in an inference forward: probes of some examples at a time.
    in_flight = f"train.micro_batch_size={BATCH}"
    for text in [
        *TASKS["sst2"]["settings"],
        *method.settings,
        in_flight,
        f"data.dir={places.data / 'sst2'}",
    ]:
        set_dotted(settings, *parse_override(text, LlmConfig))
    plan = llm_run.make_plan(make_config(settings, LlmConfig))
    base = load_base(plan.config, plan.model_folder, plan.device, plan.dtype)
    base.lm.part_before_(base.trained)
    size = build.micro_batch_size(plan.config, method.batch)
    encoded = encode(base.lm, plan.splits.train, plan.config.data.max_tokens)
    whole = TextBatches(base.lm, encoded, batch_size=BATCH, seed=0)
    folder = Path(tempfile.mkdtemp())
    batches = TextBatches(
        base.lm, encoded, batch_size=method.batch, seed=0, micro_batch_size=size, keep_in=folder
    )

    def objective(batch: Batch) -> torch.Tensor:
        return task_loss(base.lm, batch)

    def inference() -> None:
        for step in range(2):
            mean_loss(objective, whole(step).micro_batches)

    def steps() -> None:
        probing, schedule = build.probing(plan.config), build.schedule(plan.config)
        theta, optimizer = base.theta, base.optimizer
        setup = Setup(
            objective, batches, theta, optimizer, probing, schedule, take_step=base.take_step
        )
        train(setup, max_steps=2)

    def full_tuning() -> None:
        weights = [
            base.lm.model.get_submodule(layer).weight.requires_grad_(True) for layer in base.scales
        ]
        optimizer = torch.optim.AdamW(weights)
        for step in range(2):
            optimizer.zero_grad()
            (objective(whole(step).micro_batches[0]).sum() / BATCH).backward()
            optimizer.step()

    inference()
    at_rest = peak_of(inference) - imports
    if name == "adamw":
        step = peak_of(full_tuning) - imports
    elif base.take_step is not None:
        step = peak_of(steps) - imports
    else:
        # 16-bit products keep 3 MB for every shape that they have seen, and a step's are others:
        # none may be new below
        steps()
        again = peak_of(inference)  # a step of these leaves nothing else behind
        step = at_rest + peak_of(steps) - again
    return {
        "inference_mb": round(at_rest / 1e6),
        "step_mb": round(step / 1e6),
        "memory_over_inference": round(step / at_rest, 4),
    }
