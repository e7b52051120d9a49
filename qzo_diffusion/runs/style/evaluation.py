"""Compute the scores of a style run: the base, the scales that it began with, and the tuned ones,
at equal prompts and seeds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from qzo_diffusion.config.style import Config
from qzo_diffusion.core.dense import Dense
from qzo_diffusion.core.errors import OutputError
from qzo_diffusion.core.grouped import Grouped
from qzo_diffusion.core.merge import merge_changes_
from qzo_diffusion.core.parametrization import Parametrization
from qzo_diffusion.core.probes import sample_losses
from qzo_diffusion.core.scales import ScaleSet
from qzo_diffusion.diffusion.families.family import model_loss
from qzo_diffusion.diffusion.flow_matching import Batch
from qzo_diffusion.evaluate import signal
from qzo_diffusion.quant.load import handles_of
from qzo_diffusion.runs import build
from qzo_diffusion.runs.style import batches as style_data
from qzo_diffusion.runs.style import pipeline
from qzo_diffusion.runs.style import plan as style_run
from qzo_diffusion.runs.style.levels import for_samples
from qzo_diffusion.runs.tuned import Tuned, load_tuned
from qzo_diffusion.system.console import report
from qzo_diffusion.train.distributed import Ranks

AFFORDABLE = 200_000_000  # the most parameters of a model whose backward pass is computed
Scales = dict[str, Tensor]


@dataclass
class Work:
    """The model of a run, with base or tuned scales, and the data for its scores."""

    plan: style_run.StylePlan
    encoded: style_data.Encoded
    transformer: nn.Module
    sampled: nn.Module  # the same, as pictures are made with it
    scales: ScaleSet
    theta: Parametrization
    held_out: list[Batch]

    def objective(self, batch: Batch) -> torch.Tensor:
        return model_loss(self.plan.family, self.transformer, batch, self.plan.dtype)


@dataclass
class Measured:
    """Pictures, losses and estimates of each state ("base", "begun", "tuned")."""

    pictures: dict[str, list[Image.Image]]
    losses: dict[str, list[float]]
    signals: dict[str, dict[str, Any]]
    moved: list[dict[str, Any]]


def load(plan: style_run.StylePlan) -> Work:
    config = plan.config
    encoded = style_data.encode(
        config, plan.model_folder, plan.style, plan.prompts, plan.device, plan.dtype
    )
    runtime = pipeline.Runtime(plan.model_folder, plan.device, plan.dtype)
    transformer, scales, theta = pipeline.load_base(config, runtime)
    held_out = style_data.validation_batches(
        plan.style.validation,
        encoded,
        plan.device,
        build.validated_at_once(config),
        config.train.seed,
    )
    sampled = for_samples(config, plan.family, transformer, scales)
    return Work(plan, encoded, transformer, sampled, scales, theta, held_out)


def states_of(work: Work, tuned: Tuned) -> dict[str, Scales | None]:
    """Return scales by state, in the order of measurement; None is the base, which is loaded.

    Raises:
        ModelError: the scales belong to another model.
    """
    codes = build.fingerprints(work.transformer, work.scales)[0]
    given = {"begun": begun_with(work.plan.config), "tuned": tuned}
    states: dict[str, Scales | None] = {"base": None}
    for name, one in given.items():
        if one is not None:
            one.check(codes)
            states[name] = one.over(work.scales)
    return states


def begun_with(config: Config) -> Tuned | None:
    """Load the scales of `init_from`; None without it, or, with a warning, if they are gone."""
    if config.init_from is None:
        return None
    try:
        return load_tuned(Path(config.init_from))
    except OutputError as error:
        report(
            f"warning: the run began with {config.init_from}, which can't be read: {error.got}; "
            "its gain is counted as this run's"
        )
        return None


def _has_exact(theta: Parametrization) -> TypeGuard[Dense | Grouped]:
    """Whether exact gradients can be had by theta's numbers: not of sums over a subspace, nor of
    rounded codes, which have columns that the scales of their layers lack.
    """
    if isinstance(theta, Grouped):
        return not (theta.rounds or theta.in_subspace)
    return isinstance(theta, Dense)


@np.errstate(invalid="ignore", over="ignore")  # a diverged run has slopes that are not finite
def measure(work: Work, states: Mapping[str, Scales | None], draw: Any, lr: float) -> Measured:
    """Measure all states. The model is left as tuned.

    Args:
        draw: draws the pictures of a state, `draw(work, state)`.
        lr: the run's rate, for the size of a step.
    """
    start = {name: one.detach().clone().cpu() for name, one in work.scales.tensors().items()}
    found = Measured({}, {}, {}, [])
    before = "begun" if "begun" in states else "base"
    for state, scales in states.items():
        if scales is not None:
            merge_changes_(work.scales, [(scales, 1.0)])
        found.pictures[state] = draw(work, state)
        found.losses[state] = [
            loss for batch in work.held_out for loss in sample_losses(work.objective, batch)
        ]
        if state in (before, "tuned"):
            found.signals["base" if state == before else state] = _signal(work, lr)
    if work.plan.config.qzo.parametrization != "codes":
        tuned = states["tuned"] or start
        found.moved = signal.moved(states.get("begun") or start, tuned)
    return found


def _signal(work: Work, lr: float) -> dict[str, Any]:
    """Measure the signal at the scales as they are now, on batches of steps after the run's last.

    `lr` gives the size of a step.
    """
    config = work.plan.config
    batches = style_data.TrainingBatches(
        config, work.plan.style.train, work.encoded, work.plan.device, Ranks()
    )
    probed, other = (batches(config.train.max_steps + index) for index in (1, 2))
    first, second = (
        [replace(batch, patch_groups=1) for batch in step.micro_batches] for step in (probed, other)
    )
    probing = replace(
        build.probing(config), seed=config.train.seed + 1, normalize=bool(config.qzo.normalize)
    )
    found = signal.two_seeds(work.objective, first, second, work.theta, probing, signal.DIRECTIONS)
    estimates = signal.estimates_of(work.objective, probed, work.theta, probing)
    found["step_sizes"] = signal.step_sizes(work.theta, estimates[0], lr)
    parameters = sum(parameter.numel() for parameter in work.transformer.parameters())
    if _has_exact(work.theta) and parameters <= AFFORDABLE and config.qzo.units == "relative":
        found["exact"] = signal.exact_cosine(
            work.objective,
            probed,
            work.theta,
            lambda: handles_of(work.transformer),
            probing,
            estimates,
        )
    return found
