"""Memory of steps by gradients at full size on a CPU, against inference and against the plan:
`OMP_NUM_THREADS=2 python -m benchmarks.everyday.first_order`.

The model is the synthetic SD3.5 Large of `benchmarks.sd35_full_size` (stages `shards` and `load`
first, with the same --folder), at 256 px, batch 1, in bf16. A step is one of `--method fo-scales`
over rows and columns. Memory is VmHWM, imports included. `--layers N` is the same in small, and
nothing is recorded then."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.everyday.figures import record
from benchmarks.full_size.weights import status
from benchmarks.resident import peak_of
from benchmarks.sd35_full_size.__main__ import DEFAULT_FOLDER
from benchmarks.sd35_full_size.model import LARGE, batch_of, import_everything, load_model

MODEL, SIDE = "stabilityai/stable-diffusion-3.5-large", 256
LEVELS = ("separable", "dense")


def config_of(level: str) -> Any:
    from qzo_diffusion.config.files import make_config

    settings = {"parametrization": level}
    train = {"lr": 1e-9, "micro_batch_size": 1}  # memory is what is measured
    given = {"model": MODEL, "method": "fo-scales", "qzo": settings, "train": train}
    return make_config(given | {"data": {"resolution": SIDE}})


def planned(level: str, layers: int) -> float:
    """Bytes of the train phase, without the VAE and the data, which are not loaded here."""
    from qzo_diffusion.diffusion.pipeline_shape import known_shape
    from qzo_diffusion.runs.style import pipeline
    from qzo_diffusion.runs.style.memory import memory_plan

    shape = known_shape(MODEL)
    assert shape is not None
    config = {**shape.transformer.config, "num_layers": layers}
    shape = replace(shape, transformer=replace(shape.transformer, config=config))
    place = pipeline.Runtime(Path(MODEL), torch.device("cpu"), torch.bfloat16, shape)
    plan = memory_plan(config_of(level), place)
    (train,) = [phase for phase in plan.phases if phase.name == "train"]
    return sum(size for name, size in train.parts.items() if name not in ("VAE", "encoded data"))


def measured(folder: Path, level: str, steps: int) -> dict[str, float]:
    """Peaks in GB: of inference, and of steps."""
    from qzo_diffusion.core.probing import StepBatch
    from qzo_diffusion.diffusion.families.family import model_loss
    from qzo_diffusion.diffusion.families.sd3 import SD3
    from qzo_diffusion.runs import build
    from qzo_diffusion.train.loop import Setup

    import_everything()
    model = load_model(folder, folder / "copies")
    batch, config = batch_of(model, SIDE), config_of(level)

    def objective(one: Any) -> Tensor:
        return model_loss(SD3, model, one, torch.bfloat16)

    @torch.no_grad()
    def inference() -> None:
        for _ in range(2):
            objective(batch).sum().item()

    inference()
    of_inference = peak_of(inference)
    _, theta = build.scales_and_theta(config, model)
    optimizer, take_step = build.first_order(config, model)
    whole = StepBatch([batch])
    probing = build.probing(config)
    setup = Setup(objective, lambda _: whole, theta, optimizer, probing, lambda _: 1e-9)

    def work() -> None:
        for step in range(steps):
            take_step(setup, whole, step)
            print(f"{level}: step {step}, {status('VmHWM'):.2f} GB at the most", flush=True)

    of_steps = peak_of(work)
    return {"inference_gb": of_inference / 1e9, "steps_gb": of_steps / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--layers", type=int, default=LARGE["num_layers"])
    parser.add_argument("--level", choices=LEVELS, default=LEVELS[0])
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    found = measured(options.folder, options.level, options.steps)
    plan = planned(options.level, options.layers) / 1e9
    figures = {
        "fo_plan_error": round(abs(plan - found["steps_gb"]) / found["steps_gb"], 4),
        "fo_memory_over_inference": round(found["steps_gb"] / found["inference_gb"], 4),
        "fo": {name: round(value, 3) for name, value in (found | {"plan_gb": plan}).items()},
    }
    print(json.dumps(figures, indent=1))
    if options.layers == LARGE["num_layers"] and options.level == LEVELS[0]:
        print(record("first_order", figures))


if __name__ == "__main__":
    main()
