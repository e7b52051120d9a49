"""Build objects from a config, for any kind of run.

The code below this file knows no config.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qzo_diffusion import devices, resources
from qzo_diffusion.config.llm import LlmConfig
from qzo_diffusion.config.sections import QuantConfig, RunConfig
from qzo_diffusion.config.style import Config
from qzo_diffusion.core.errors import ConfigError
from qzo_diffusion.core.exact_product import blocks_of, nothing
from qzo_diffusion.core.journal_format import MOST_SCALARS
from qzo_diffusion.core.near_base import NearBase
from qzo_diffusion.core.optimizer import Adam, Optimizer, Schedule, make_optimizer, make_schedule
from qzo_diffusion.core.oracle import exact_gradient
from qzo_diffusion.core.parametrization import Parametrization
from qzo_diffusion.core.parametrize import parametrize
from qzo_diffusion.core.probing import Probing
from qzo_diffusion.core.quzo import Codes, ErrorFeedback
from qzo_diffusion.core.rounded_codes import RoundedCodes
from qzo_diffusion.core.scales import ScaleSet
from qzo_diffusion.core.weights import WeightHandle
from qzo_diffusion.quant.available import bitsandbytes_problem
from qzo_diffusion.quant.base import fingerprint
from qzo_diffusion.quant.choose import chosen, last_readers
from qzo_diffusion.quant.load import find_codes, find_scales, frozen_fingerprint, handles_of
from qzo_diffusion.quant.stream import Quantization
from qzo_diffusion.runs.subspace import load_subspace
from qzo_diffusion.system.console import report
from qzo_diffusion.system.heap import give_back
from qzo_diffusion.train.first_order import Gradient, first_order_step
from qzo_diffusion.train.loop import TakeStep


def cache_folder(config: Config | LlmConfig) -> Path:
    return Path(config.data.cache_dir) if config.data.cache_dir else resources.cache_folder()


def quantization(quant: QuantConfig, skip: Sequence[str] = ()) -> Quantization:
    """Return the settings of quantization; `skip` is for models whose settings name no layers."""
    skipped = tuple(skip if quant.skip is None else quant.skip)
    return Quantization(quant.type, quant.blocksize, skipped, quant.backend, quant.activations)


def resolve_dtype_(config: RunConfig, device: torch.device) -> None:
    """Fill in the dtype of forward passes, and warn where the device is slow in it."""
    dtype = devices.choose_dtype(config.compute.dtype, device)
    config.compute.dtype = devices.dtype_name(dtype)
    if told := devices.slow_dtype(dtype, device):
        report(f"warning: {told}")


def resolve_backend_(config: RunConfig, device: torch.device) -> None:
    """Take the reference back-end in place of a bitsandbytes that can't be used here, and say
    so.
    """
    four_bit = config.quant.backend == "bnb" and config.quant.type in ("nf4", "fp4")
    problem = bitsandbytes_problem(device) if four_bit else None
    if problem is not None:
        config.quant.backend = "reference"
        report(
            f"warning: {problem}; the reference back-end is used, which is slower "
            "(quant.backend=reference)"
        )


def copies_folder(config: Config | LlmConfig) -> Path:
    """Return the folder that keeps 4-bit copies of large models for the next start."""
    return cache_folder(config) / "quantized"


def scales_and_theta(
    config: RunConfig,
    transformer: nn.Module,
    beside: Sequence[WeightHandle] = (),
    own_patch: Callable[[Iterable[str]], list[str]] = lambda names: [],
) -> tuple[ScaleSet, Parametrization]:
    """Return the scales or codes of the chosen layers with the unquantized tensors `beside`, and
    theta over them.

    Args:
        own_patch: chooses the layers that change mostly the loss of their own patch.

    Raises:
        ConfigError: `qzo.layers` matches no layer.
    """
    level, wanted, codes = config.qzo.parametrization, config.qzo.layers, config.trains_codes
    scales, grids = find_codes(transformer) if codes else (find_scales(transformer, beside), {})
    trained = trained_of(scales, wanted)
    token_wise = own_patch(scales) if config.qzo.regions > 1 else []
    if scales.weights.issuperset(trained):
        remedy = "correct qzo.layers, or give null for all layers"
        raise ConfigError(
            f"qzo.layers = {wanted}: no such layer",
            f"parts of names like {next(iter(scales))}",
            remedy,
        )
    one_a_row = (live.numel() == scales.rows(name) for name, live in scales.tensors().items())
    if level == "column" and all(one_a_row):
        raise ConfigError(
            "qzo.parametrization = column on layers with one scale for each output",
            "row, layer or separable, which such a format has numbers for",
            "use qzo.parametrization=separable",
        )
    if level == "codes":
        return scales, Codes(scales, grids, trained, config.qzo.probe)
    stored = RoundedCodes(scales, grids, config.quant.blocksize) if codes else None
    named = config.qzo.subspace
    try:
        return scales, parametrize(
            scales,
            level,
            config.qzo.units,
            trained,
            token_wise,
            last_readers(scales),
            stored,
            load_subspace(named),
        )
    except ValueError as error:
        if named is None:
            raise
        raise ConfigError(
            f"qzo.subspace={named}: {error}",
            "directions of the rows of all trained layers of this model",
            "give the file of this model, or the layers that it was made for (qzo.layers)",
        ) from None


def trained_of(scales: ScaleSet, wanted: Sequence[str] | None) -> list[str]:
    """Return the names of the chosen layers and of all unquantized tensors."""
    of_layers = set(chosen([name for name in scales if name not in scales.weights], wanted))
    return [name for name in scales if name in of_layers or name in scales.weights]


def probing(config: RunConfig) -> Probing:
    return Probing(
        seed=config.train.seed,
        eps=config.qzo.eps,
        num_directions=config.qzo.num_directions,
        per_example=config.qzo.per_example,
        distribution=config.qzo.directions,
        clip_threshold=config.qzo.clip_threshold,
        # else by the optimizer, which knows the earlier steps
        normalize=config.qzo.normalize is True,
        probes_per_forward=probes_at_once(config),
        estimator=config.qzo.estimator,
        within_example=isinstance(config, Config) and scored_alone(config),
    )


def scored_alone(config: Config) -> bool:
    """Whether the derivatives of each prompt's pictures are normalised apart from the others."""
    return bool(config.reward.scores) and config.reward.normalize


def probes_of_example(config: RunConfig) -> int:
    """Return the number of forward passes that a step makes of each example."""
    return config.qzo.num_directions * (1 if config.qzo.estimator == "leave_one_out" else 2)


def step_in_words(config: RunConfig, examples: int, things: str, of_prior: int = 0) -> str:
    """Describe the cost of a step of `examples` of these `things`.

    Each example of the prior needs one pass more, for the base's prediction.
    """
    count, probes = config.qzo.num_directions, probes_of_example(config)
    along = (
        f"{count} direction{'s' * (count > 1)} "
        f"{'of each' if config.qzo.per_example else 'that all share'}"
    )
    sides = "" if config.qzo.estimator == "leave_one_out" else ", at both sides"
    at_once = (
        ""
        if config.train.micro_batch_size is None
        else f", {config.train.micro_batch_size} at once"
    )
    beside = f" + {of_prior} of the prior" if of_prior else ""
    passes = examples * probes + of_prior * (probes + 1)
    return f"{examples} {things}{beside}, {along}{sides}: {passes} forward passes{at_once}"


def probes_at_once(config: RunConfig) -> int:
    """Return how many probes of an example share a forward pass: all of its directions, or both
    sides of one, as far as there is room.
    """
    if not config.qzo.scales_activations or getattr(config, "method", "") == "fo-scales":
        return 1
    wanted, every = (
        config.train.micro_batch_size,
        config.qzo.num_directions if config.qzo.estimator == "leave_one_out" else 2,
    )
    return every if wanted is None else min(wanted, every)


def micro_batch_size(config: RunConfig, whole: int) -> int:
    """Return how many of `whole` examples share a forward pass with `probes_at_once` probes."""
    wanted = config.train.micro_batch_size
    return whole if wanted is None else max(1, wanted // probes_at_once(config))


def validated_at_once(config: Config) -> int:
    """Return how many held-out examples share a forward pass: no more rows than a step has."""
    rows = config.train.micro_batch_size
    return config.data.batch_size if rows is None else min(config.data.batch_size, rows)


def check_share(batch_size: int, processes: int) -> None:
    """Check that every process has an example of each batch. Raises ConfigError."""
    if batch_size < processes:
        raise ConfigError(
            f"data.batch_size={batch_size} on {processes} processes",
            "at least one example a process",
            f"use data.batch_size={processes} or more, or fewer processes",
        )


def check_scalars(config: RunConfig, examples: int, patch_groups: int = 1) -> None:
    """Check that a record of the journal has room for the scalars of a step. Raises ConfigError."""
    directions = config.qzo.num_directions * (examples if config.qzo.per_example else 1)
    if directions * patch_groups > MOST_SCALARS:
        raise ConfigError(
            f"{directions} directions a step, {patch_groups} patch groups each: "
            f"{directions * patch_groups} scalars",
            f"at most {MOST_SCALARS}, the room in a record of the journal",
            "lower data.batch_size, qzo.num_directions or qzo.regions",
        )


def optimizer(config: RunConfig) -> Optimizer:
    train = config.train
    if train.optimizer == "feedback":
        return ErrorFeedback(train.feedback_decay, train.feedback_steps)
    running = config.qzo.normalize == "running"
    return near_base(config, make_optimizer(train.optimizer, running, train.state_bits))


def adam(config: RunConfig) -> Adam:
    """Return the optimizer of methods that follow exact gradients."""
    return Adam(state_bits=config.train.state_bits, seed=config.train.seed)


def near_base(config: RunConfig, chosen: Optimizer) -> Optimizer:
    """Let `chosen` keep θ near the base as `prior.decay` and `prior.bound` say."""
    prior = config.prior
    return chosen if prior.off else NearBase(chosen, prior.decay, prior.bound)


def first_order(config: RunConfig, model: nn.Module) -> tuple[Optimizer, TakeStep]:
    """Return Adam along the exact gradient of the trained scales, the baseline of zeroth order."""
    return near_base(config, adam(config)), first_order_step(exact_gradients(model))


def exact_gradients(model: nn.Module) -> Gradient:
    """Return what computes the exact gradient of trained scales."""
    # only there the C library's heap holds the tensors
    tidy = give_back if next(model.parameters()).device.type == "cpu" else nothing

    def gradient(objective: Any, micro_batches: Any, theta: Any) -> dict[str, Tensor]:
        handles, blocks = handles_of(model), blocks_of(model)
        return exact_gradient(objective, micro_batches, theta, handles, blocks, tidy)

    return gradient


def schedule(config: RunConfig, rate_factor: float = 1.0) -> Schedule:
    train = config.train
    return make_schedule(
        train.schedule, train.lr * rate_factor, train.max_steps, train.warmup_steps
    )


def fingerprints(model: nn.Module, scales: ScaleSet) -> tuple[str, str]:
    """Return hashes of the frozen and of the trained tensors as they are now: codes and scales, or
    scales and codes.
    """
    return frozen_fingerprint(model, scales), fingerprint(scales.tensors().items())
