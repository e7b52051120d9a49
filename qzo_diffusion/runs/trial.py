"""`--dry-run --trial-step`: the time and memory of one step, measured before a run begins."""

import time

from qzo_diffusion import devices
from qzo_diffusion.runs.ending import in_words
from qzo_diffusion.runs.plan import Plan
from qzo_diffusion.train.distributed import Ranks
from qzo_diffusion.train.loop import train_step_

WARM_UP = 1  # steps; the first step of a process also fills caches


def trial_step(plan: Plan) -> str:
    """Load everything, take a few steps of the smallest rate, and describe the time and memory of a
    run.

    No run folder is made. Encoded data stays in the cache.
    """
    ranks = Ranks()
    components, steps = plan.load(ranks), plan.config.train.max_steps
    smallest = plan.config.train.lr * 1e-6
    setup, seconds = components.setup(plan.probing(), lambda _: smallest), 0.0
    for step in range(WARM_UP + 1):
        batch, started = components.batches(step), time.perf_counter()
        (setup.take_step or train_step_)(setup, batch, step)
        seconds = time.perf_counter() - started
    peak = devices.peak_bytes(plan.device)
    memory = "" if peak is None else f", {peak / 1e9:.2f} GB at the peak"
    return (
        f"trial     a step takes {in_words(seconds)}, {steps} steps {in_words(steps * seconds)}, "
        f"pictures and validation apart{memory}"
    )
