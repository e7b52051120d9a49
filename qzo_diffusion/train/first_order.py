"""First-order training in the same loop: what zeroth-order runs are compared with, on the same
numbers, batches and schedule.

Where the gradient comes from is the caller's affair; here is Adam on it, and the step that the loop
takes."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qzo_diffusion.core.parametrization import Parametrization
from qzo_diffusion.core.probes import Objective
from qzo_diffusion.core.spsa import SumOverRanks, no_reduce
from qzo_diffusion.train.loop import Probing, StepBatch, StepRecord, TakeStep

Gradient = Callable[[Objective[Any], Sequence[Any], Parametrization], dict[str, Tensor]]
"""Objective, micro-batches, numbers -> the gradient of the mean loss, by name, in the shapes of
`numbers.numbers()`.
"""


class ExactAdam:
    """Adam on a gradient that is known; betas as in `core.optimizer.Adam`."""

    def __init__(self, beta1: float = 0.9, beta2: float = 0.99, tiny: float = 1e-8) -> None:
        self.beta1, self.beta2, self.tiny = beta1, beta2, tiny
        self._count = 0
        self._moments: dict[str, Tensor] = {}

    def step_(self, theta: Parametrization, gradient: dict[str, Tensor], lr: float) -> None:
        self._count += 1
        bias1, bias2 = 1 - self.beta1**self._count, 1 - self.beta2**self._count
        for name, slope in gradient.items():
            first = self._moments.setdefault(f"first.{name}", torch.zeros_like(slope))
            second = self._moments.setdefault(f"second.{name}", torch.zeros_like(slope))
            first.mul_(self.beta1).add_(slope * (1 - self.beta1))
            second.mul_(self.beta2).add_(slope * slope * (1 - self.beta2))
            theta.add_(name, first / (torch.sqrt(second / bias2) + self.tiny) * (-lr / bias1))

    def state(self) -> dict[str, Tensor]:
        return self._moments | {"count": torch.tensor(self._count)}

    def load_state_(self, state: dict[str, Tensor]) -> None:
        self._count = int(state["count"])
        self._moments = {name: tensor.clone() for name, tensor in state.items() if name != "count"}


def first_order_step(gradient: Gradient) -> TakeStep:
    """A step along `gradient`. Its record tells the loss of the batch as both probes', and the
    gradient's norm as the derivative.

    One process only: gradients are not exchanged.
    """

    def take_step(
        objective: Objective[Any],
        batch: StepBatch[Any],
        parametrization: Parametrization,
        optimizer: Any,
        probing: Probing,
        lr: float,
        step: int,
        sum_over_ranks: SumOverRanks = no_reduce,
    ) -> StepRecord:
        started = time.perf_counter()
        losses: list[float] = []

        def noting(micro_batch: Any) -> Tensor:
            found = objective(micro_batch)
            losses.extend(found.detach().double().reshape(-1).tolist())
            return found

        slopes = gradient(noting, batch.micro_batches, parametrization)
        norm = math.sqrt(sum(float(slope.double().square().sum()) for slope in slopes.values()))
        loss = math.fsum(losses) / len(losses)
        finite = math.isfinite(norm) and math.isfinite(loss)
        if finite:
            optimizer.step_(parametrization, slopes, lr)
        return StepRecord(
            step=step,
            loss_plus=loss,
            loss_minus=loss,
            loss=loss,
            directional_derivative=norm,
            projected_grad=norm,
            lr=lr,
            eps=0.0,
            clipped=False,
            skipped=not finite,
            sigma_mean=batch.sigma_mean,
            seconds=time.perf_counter() - started,
        )

    return take_step
