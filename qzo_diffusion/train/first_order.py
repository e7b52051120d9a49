"""First-order training in the same loop: the comparison for zeroth-order runs, on the same
parametrization, batches and schedule.

The caller says where the gradient comes from. Here is the step that the loop takes with it."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from qzo_diffusion.core.optimizer import Adam
from qzo_diffusion.core.parametrization import Parametrization
from qzo_diffusion.core.probes import Objective
from qzo_diffusion.core.probing import StepBatch
from qzo_diffusion.core.spsa import Estimate, exact_sum
from qzo_diffusion.train.loop import Setup, StepRecord, TakeStep

Gradient = Callable[[Objective[Any], Sequence[Any], Parametrization], dict[str, Tensor]]
"""Objective, micro-batches, parametrization -> the gradient of the mean loss, by name, in the
shapes of `parametrization.templates()`."""


def first_order_step(gradient: Gradient) -> TakeStep:
    """Take each step with `Adam` along `gradient`.

    Its record has the loss of the batch for both probes, and the gradient's norm as derivative.
    One process only: gradients are not exchanged."""

    def take_step(setup: Setup[Any], batch: StepBatch[Any], step: int) -> StepRecord:
        started = time.perf_counter()
        losses: list[float] = []

        def noted(micro_batch: Any) -> Tensor:
            found = setup.objective(micro_batch)
            losses.extend(found.detach().double().reshape(-1).tolist())
            return found

        slopes = gradient(noted, batch.micro_batches, setup.parametrization)
        found, lr = _as_estimate(losses, slopes), setup.schedule(step)
        if found.finite:
            adam: Adam = setup.optimizer
            adam.descend_(setup.parametrization, slopes, lr)
        seconds = time.perf_counter() - started
        return StepRecord(step, found, lr, 0.0, batch.sigma_mean, seconds)

    return take_step


def _as_estimate(losses: Sequence[float], slopes: dict[str, Tensor]) -> Estimate:
    norm = math.sqrt(sum(float(slope.double().square().sum()) for slope in slopes.values()))
    loss = exact_sum(losses) / len(losses)
    return Estimate((), (loss,), (loss,), (norm,), (norm,), (False,))
