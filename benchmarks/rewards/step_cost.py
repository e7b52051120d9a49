"""Time and memory of a step on rewards over those of as many plain samplings, on a random model of
250 million numbers and on the embedded one.

Both draw, decode and score the same number of pictures in forward passes of the same number of
rows. A step adds the factors of its probes and the update."""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.resident import peak_of, resident
from benchmarks.step_time import build_model, random_batch
from qzo_diffusion import resources
from qzo_diffusion.core.optimizer import make_optimizer
from qzo_diffusion.core.parametrize import parametrize
from qzo_diffusion.core.probing import Probing, StepBatch
from qzo_diffusion.diffusion.families.sd3 import SD3
from qzo_diffusion.diffusion.model_folder import load_scheduler
from qzo_diffusion.diffusion.vae import load_vae
from qzo_diffusion.quant.choose import last_readers
from qzo_diffusion.quant.load import find_scales
from qzo_diffusion.rewards.drawing import Drawer
from qzo_diffusion.rewards.objective import RewardObjective
from qzo_diffusion.rewards.of_pixels import compressibility
from qzo_diffusion.rewards.pictures import PictureBatch
from qzo_diffusion.train.loop import Setup, train_step_

# name -> side of the latents, tokens of the text, prompts, rows of a forward pass
CASES = {"tiny": (8, 32, 4, 16), "sd3_250m": (32, 154, 1, 4)}
DIRECTIONS, STEPS = 8, 4


def step_cost(options: argparse.Namespace) -> dict[str, Any]:
    rounds = max(1, min(options.steps, 5))
    found = {name: measured(name, rounds) for name in CASES}
    large = found["sd3_250m"]
    return {
        "=step_over_sampling": large["time"],
        "=memory_over_sampling": large["memory"],
        "cases": found,
        "rounds": rounds,
    }


def measured(name: str, rounds: int) -> dict[str, float]:
    """Return the ratios of time (median over rounds) and of peak memory above the imports."""
    imports = resident("VmRSS")
    sampling, step = works(name, torch.float32)
    sampling(), step()
    peaks = [peak_of(work) - imports for work in (sampling, step)]
    ratios = []
    for _ in range(rounds):
        plain, probed = seconds_of(sampling), seconds_of(step)
        ratios.append(probed / plain)
    return {"time": statistics.median(ratios), "memory": peaks[1] / peaks[0]}


def seconds_of(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def works(name: str, dtype: torch.dtype) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return a plain sampling of all pictures of a step, and the step."""
    side, tokens, prompts, rows = CASES[name]
    model, folder = build_model(name, dtype), resources.tiny_model()
    drawer = Drawer(
        SD3,
        model,
        load_scheduler(folder, SD3),
        load_vae(folder, SD3, torch.device("cpu")),
        steps=STEPS,
        guidance=0.0,
        decoded_at_once=4,
        dtype=dtype,
    )
    drawn = random_batch(model, side, tokens, prompts)
    texts = tuple(f"prompt {at}" for at in range(prompts))
    encoded = (drawn.prompt_embeds, drawn.pooled)
    batch = PictureBatch(drawn.noise, *encoded, *encoded, texts)
    objective = RewardObjective(drawer.pictures, compressibility)
    scales = find_scales(model)
    theta = parametrize(scales, "separable", last_readers=last_readers(scales))
    setup = Setup(
        objective,
        lambda step: StepBatch(batch.split(max(1, rows // DIRECTIONS))),
        theta,
        make_optimizer("sgd"),
        Probing(
            0,
            3e-2,
            DIRECTIONS,
            per_example=True,
            normalize=True,
            probes_per_forward=min(rows, DIRECTIONS),
            estimator="leave_one_out",
            within_example=True,
        ),
        lambda step: 1e-6,
    )
    steps = iter(range(10**9))
    all_pictures = batch.repeated(DIRECTIONS).split(rows)
    return (
        lambda: [objective(part) for part in all_pictures],
        lambda: train_step_(setup, setup.batch_of_step(0), next(steps)),
    )
