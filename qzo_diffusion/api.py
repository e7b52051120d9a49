"""Tune any quantized `nn.Module` with any loss, from Python. `docs/api.md` is the tour; its code
runs as a test.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from qzo_diffusion.core.noise import Distribution
from qzo_diffusion.core.optimizer import OptimizerName, ScheduleName, make_optimizer, make_schedule
from qzo_diffusion.core.parametrize import Level, Units, parametrize
from qzo_diffusion.core.probing import Estimator, Probing, StepBatch
from qzo_diffusion.quant.load import find_scales, quantize_
from qzo_diffusion.train.loop import Outcome, Setup, StepRecord, train

__all__ = ["find_scales", "quantize_", "tune_"]


def tune_(
    model: nn.Module,
    loss: Callable[[Any], Tensor],
    batches: Sequence[Any] | Callable[[int], Any],
    *,
    steps: int,
    lr: float,
    eps: float = 1e-2,
    level: Level = "dense",
    units: Units = "relative",
    optimizer: OptimizerName = "sgd",
    schedule: ScheduleName = "constant",
    num_directions: int = 1,
    estimator: Estimator = "antithetic",
    per_example: bool = False,
    directions: Distribution = "rademacher",
    clip_threshold: float | None = None,
    seed: int = 0,
    on_step: Callable[[StepRecord], None] = lambda record: None,
) -> Outcome:
    """Tune the quantization scales of `model` in place by forward passes alone (Q-SPSA, arXiv
    2505.13430).

    Args:
        model: holds at least one quantized layer, see `quantize_`.
        loss: a batch -> one loss per example, [B], or a scalar. Called under `no_grad`, twice per
            direction and step, or once with `leave_one_out`; anything random must come from the
            batch, so that all calls see the same.
        batches: a sequence that is cycled through, or a function from the step (counted from 0) to
            its batch.
        estimator: "antithetic" measures both sides of every direction; "leave_one_out" one side of
            each of `num_directions` (eight or so), which it sets against the mean of the others:
            more directions for as many forward passes (`core.spsa`).
        per_example: directions of its own for every example, for all levels but "dense"; batches
            then need a length.
        lr, eps: in fractions of a scale (relative units), or in the scales' own units (absolute).

    Raises:
        ModelError: nothing in the model can be tuned.
        TrainingDiverged: ten steps in a row had a loss that is NaN or infinite; the scales are
            those of the last good step.
    """

    def batch_of_step(step: int) -> StepBatch[Any]:
        return StepBatch([batches(step) if callable(batches) else batches[step % len(batches)]])

    scales = find_scales(model)
    theta = parametrize(scales, level, units)
    setup = Setup(
        loss,
        batch_of_step,
        theta,
        make_optimizer(optimizer),
        Probing(
            seed,
            eps,
            num_directions,
            per_example,
            directions,
            clip_threshold,
            estimator=estimator,
        ),
        make_schedule(schedule, lr, steps),
    )
    try:
        return train(setup, max_steps=steps, on_step=on_step)
    finally:
        theta.merge_()
