"""Tune any quantized `nn.Module` with any loss, and apply a delta to a pipeline of diffusers, from
Python. `docs/api.md` is the tour; its code runs as a test.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from qzo_diffusion.core.errors import ConfigError, ModelError
from qzo_diffusion.core.noise import Distribution
from qzo_diffusion.core.optimizer import OptimizerName, ScheduleName, make_optimizer, make_schedule
from qzo_diffusion.core.parametrize import Level, Units, parametrize
from qzo_diffusion.core.probing import Estimator, Probing, StepBatch
from qzo_diffusion.core.scales import ScaleSet
from qzo_diffusion.quant.choose import matching
from qzo_diffusion.quant.load import find_scales, quantize_
from qzo_diffusion.train.loop import Outcome, Setup, StepRecord, train

__all__ = ["apply_delta", "find_scales", "quantize_", "tune_"]

_BASES: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()
"""The base's scales of each transformer that `apply_delta` has changed."""


def tune_(
    model: nn.Module,
    loss: Callable[[Any], Tensor],
    batches: Sequence[Any] | Callable[[int], Any],
    *,
    steps: int,
    lr: float,
    eps: float = 1e-2,
    level: Level = "dense",
    layers: str | Sequence[str] | None = None,
    units: Units = "relative",
    optimizer: OptimizerName = "sgd",
    schedule: ScheduleName = "constant",
    num_directions: int = 1,
    estimator: Estimator = "antithetic",
    per_example: bool = False,
    directions: Distribution = "rademacher",
    clip_threshold: float | None = None,
    normalize: bool = False,
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
        layers: parts of the names of the layers to tune, such as ["mlp"]; None is all.
        normalize: divide the slopes of a step by their rms, so that `lr` does not depend on the
            scale of the loss. A step of one direction then keeps only its sign.
        lr, eps: in fractions of a scale (relative units), or in the scales' own units (absolute).

    Raises:
        ModelError: nothing in the model can be tuned, or nothing of one of `layers`.
        TrainingDiverged: ten steps in a row had a loss that is NaN or infinite; the scales are
            those after the last step with a finite loss.
    """

    def batch_of_step(step: int) -> StepBatch[Any]:
        return StepBatch([batches(step) if callable(batches) else batches[step % len(batches)]])

    scales = find_scales(model)
    theta = parametrize(scales, level, units, _trained(scales, layers))
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
            normalize,
            estimator=estimator,
        ),
        make_schedule(schedule, lr, steps),
    )
    try:
        return train(setup, max_steps=steps, on_step=on_step)
    finally:
        theta.merge_()


def _trained(scales: ScaleSet, layers: str | Sequence[str] | None) -> list[str] | None:
    """The names of the layers that are tuned; None is all."""
    if layers is None:
        return None
    parts = [layers] if isinstance(layers, str) else list(layers)
    unknown = [part for part in parts if not matching(scales, [part])]
    if unknown or not parts:
        raise ModelError(
            f"layers={parts}" + (f", no quantized layer's name holds {unknown}" if unknown else ""),
            f"parts of names such as {next(iter(scales))}",
            "print(list(find_scales(model))) shows them all",
        )
    return matching(scales, parts)


def apply_delta(
    pipe: Any,
    file: str | Path,
    strength: float = 1.0,
    between: Sequence[float] | None = None,
) -> None:
    """Move the scales of a 4-bit transformer in a pipeline of diffusers as a run moved its own.

    Strengths count from the base: a second call replaces the first, and strength 0 gives the base
    back bit for bit. To combine runs, mix them first (`qzo-diffuse mix`).

    Args:
        pipe: any pipeline of diffusers with a quantized `transformer`, which has not made a
            picture on a CPU before. Its codes must be those of the run's base: load it from
            `export --format nf4`, or with `load_in_4bit` and the run's type, block size and layers.
        file: a delta (`export --format delta`), a run, one of its checkpoints, or their
            `scales.safetensors`.
        between: the lowest and the highest noise level, in [0, 1], at which the tuned scales serve;
            the base's serve at the others. None: everywhere.

    Raises:
        ModelError: the pipeline has no such transformer, or one with other codes; it is left as it
            was.
        OutputError: there are no scales at `file`, or they are damaged.
        ConfigError: `strength` is not finite, or `between` is no range.
    """
    from qzo_diffusion.diffusion.families.registry import DEFAULT, family_of
    from qzo_diffusion.diffusion.levels import TunedBetween, base_outside
    from qzo_diffusion.runs.tuned import apply_, load_tuned

    _check_numbers(strength, between)
    model = getattr(pipe, "transformer", None)
    if isinstance(model, TunedBetween):  # of an earlier call
        model = model.transformer
    if not isinstance(model, nn.Module):
        raise _without_transformer(pipe)
    tuned, scales = load_tuned(Path(file)), find_scales(model)
    before = {name: scales[name].clone() for name in scales}
    base = _BASES.get(model, before)
    try:
        _set(scales, base)
        apply_(model, scales, [(tuned, strength)])
    except BaseException:
        _set(scales, before)
        raise
    _BASES[model] = base
    family = family_of(getattr(model, "config", {})) or DEFAULT
    pipe.transformer = (
        model
        if between is None
        else base_outside(model, between, base, lambda: find_scales(model), family.denoiser.level)
    )


def _without_transformer(pipe: Any) -> ModelError:
    kind, wanted = type(pipe).__name__, "a pipeline of diffusers with a quantized transformer"
    if hasattr(pipe, "unet"):
        return ModelError(
            f"{kind} with a UNet, whose 1x1 convolutions are tuned and not 4-bit in diffusers",
            wanted,
            "use `sample --run`, or export the run as nf4 or bf16 and load its UNet",
        )
    return ModelError(f"{kind} without a transformer", wanted, "load the run's model in 4 bits")


def _set(scales: ScaleSet, values: dict[str, Tensor]) -> None:
    for name in scales:
        scales[name].copy_(values[name])


def _check_numbers(strength: float, between: Sequence[float] | None) -> None:
    if not math.isfinite(strength):
        raise ConfigError(f"strength={strength}", "a finite number", "use 1 for the tuned model")
    if between is not None and not (len(between) == 2 and 0 <= between[0] < between[1] <= 1):
        raise ConfigError(
            f"between={tuple(between)}",
            "the lowest and the highest of two noise levels from 0 to 1",
            "use between=(0, 0.7), or leave it out",
        )
