"""Diagnose whether the estimate carries signal. A loss curve can't show that: a run that only
diffuses has one too.

* Two seeds: the slope d along one direction is measured on two independent batches. They share the
  gradient but not the noise of the data:  signal = mean(d1·d2), noise = mean((d1 - d2)²) / 2,
  agreement = signal / (signal + noise).
* Cosine with the exact gradient of the same batch, if a backward pass is affordable, beside the
  average cosine of such directions (`core.expected_cosine`).
* Clipping, and how far each group of layers has moved.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qzo_diffusion.core.dense import Dense
from qzo_diffusion.core.expected_cosine import expected_cosine
from qzo_diffusion.core.grouped import Grouped
from qzo_diffusion.core.optimizer import Update, gradient_of
from qzo_diffusion.core.oracle import DifferentiableHandle, alignment, exact_gradient
from qzo_diffusion.core.parametrization import Parametrization
from qzo_diffusion.core.probes import Batch, Objective
from qzo_diffusion.core.probing import Probing, StepBatch
from qzo_diffusion.core.spsa import Estimate, probe
from qzo_diffusion.evaluate import intervals
from qzo_diffusion.system.progress import Progress

DIRECTIONS = 24
REPEATS = 4  # estimates that are compared with the exact gradient


def two_seeds(
    objective: Objective[Batch],
    first: Sequence[Batch],
    second: Sequence[Batch],
    theta: Parametrization,
    probing: Probing,
    count: int,
) -> dict[str, Any]:
    """Measure how far slopes along the same `count` directions agree on two independent batches.

    The batches are given in micro-batches.
    """
    plain = Probing(probing.seed, probing.eps)
    slopes = []
    for micro_batches in (first, second):
        found: list[float] = []
        for index in Progress(range(count), desc="slopes of two seeds", leave=False):
            one = probe(objective, StepBatch(micro_batches), theta, plain, index)
            found += one.directional_derivative
        slopes.append(np.array(found))
    return agreement(*slopes)


def agreement(first: intervals.Values, second: intervals.Values) -> dict[str, Any]:
    """Return signal, noise and agreement from slopes [directions] of two seeds.

    Intervals are over the directions.
    """
    both, apart = first * second, (first - second) ** 2 / 2

    def share(counts: intervals.Values) -> intervals.Values:
        signal, noise = counts @ both, counts @ apart
        return signal / np.maximum(signal + noise, np.finfo(float).tiny)

    once = np.ones((1, len(first)))
    noise = float(apart.mean())
    return {
        "directions": len(first),
        "slope_rms": float(np.sqrt((first**2 + second**2).mean() / 2)),
        "signal_to_noise": float(both.mean()) / noise if noise else None,
        "agreement": float(share(once)[0]),
        "agreement_ci95": intervals.of_statistic(len(first), share),
    }


def estimates_of(
    objective: Objective[Batch], batch: StepBatch[Batch], theta: Parametrization, probing: Probing
) -> list[Estimate]:
    """Estimate a batch several times along other directions, each as a step of the run does."""
    steps = range(DIRECTIONS, DIRECTIONS + REPEATS)
    return [probe(objective, batch, theta, probing, step) for step in steps]


def exact_cosine(
    objective: Objective[Batch],
    batch: StepBatch[Batch],
    theta: Dense | Grouped,
    handles: Callable[[], Iterable[DifferentiableHandle]],
    probing: Probing,
    estimates: Sequence[Estimate],
) -> dict[str, Any]:
    """Return the mean cosine of estimates of a batch with its exact gradient, and the expected one.

    Args:
        objective: one loss for each example, or for each patch group of it.
        handles: gives all quantized layers of the model.
        probing: the settings that the estimates were made with.
    """
    exact = exact_gradient(objective, batch.micro_batches, theta, handles())
    compared = [alignment(theta, one, exact) for one in estimates]
    return {
        "cosine": float(np.mean([one.cosine for one in compared])),
        "expected": expected_cosine(objective, batch, theta, handles, probing),
        "gradient_norm": compared[0].exact_norm,
        "numbers": sum(tensor.numel() for tensor in exact.values()),
        "derivatives": len(estimates[0].projected_grad),
    }


def step_sizes(theta: Parametrization, probed: Estimate, lr: float) -> list[dict[str, Any]]:
    """Return the rms by which one plain step at this rate moves θ, by group, the largest first."""
    update, squares = (
        Update(probed.directions, probed.projected_grad, lr),
        dict[str, list[Tensor]](),
    )
    for name in theta.templates():
        step = gradient_of(theta, update, name).double() * lr
        squares.setdefault(_group(name), []).append(step.square().flatten())
    rows = [
        {"group": group, "rms": float(torch.cat(parts).mean().sqrt())}
        for group, parts in squares.items()
    ]
    return sorted(rows, key=lambda row: -float(row["rms"]))


def _group(name: str) -> str:
    """Return the part of a name that blocks have in common: a layer in its block, or an axis."""
    return re.sub(r"^.*?\.\d+\.", "", name)


def moved(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Return how far each group of layers has moved, the farthest first: the rms and the largest of
    |log(tuned / base)|.

    A group holds the layers of one name in all blocks. Scales that are zero before or after have no
    logarithm and are left out.
    """
    groups: dict[str, list[str]] = {}
    for name in base:
        groups.setdefault(_group(name), []).append(name)
    rows = []
    for group, names in groups.items():
        pairs = [
            (base[name].double().flatten(), tuned[name].double().flatten().to(base[name].device))
            for name in names
        ]
        steps = np.concatenate(
            [(t / b)[(b > 0) & (t > 0)].log().abs().cpu().numpy() for b, t in pairs]
        )
        if len(steps):
            rms = float(np.sqrt((steps**2).mean()))
            rows.append(
                {
                    "group": group,
                    "layers": len(names),
                    "scales": len(steps),
                    "rms": rms,
                    "max": float(steps.max()),
                }
            )
    return sorted(rows, key=lambda row: -row["rms"])


def of_metrics(lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the shares of clipped probes and of skipped steps in lines of metrics.jsonl."""
    steps = [line for line in lines if "projected_grad" in line]
    return {
        "steps": len(steps),
        "clipped": float(np.mean([float(line["clipped"]) for line in steps])) if steps else None,
        "skipped": sum(bool(line["skipped"]) for line in steps) / len(steps) if steps else None,
    }


def sentence(found: Mapping[str, Any], clipped: float | None = None) -> str:
    """Return one plain sentence for a person."""
    low, high = found["agreement_ci95"] or (None, None)
    facts = (
        f"two independent batches agree on {found['agreement']:.0%} of the slope along a random "
        "direction"
    )
    if low is not None:
        facts += f" (95 % interval {low:.0%} to {high:.0%})"
    if low is not None and low > 0:
        text = f"The estimate carries signal: {facts}."
    else:
        text = (
            f"The estimate does not carry signal: {facts}; raise data.batch_size or qzo.eps, or "
            "lower train.lr."
        )
    if clipped is not None and clipped > 0.2:
        text += (
            f" {clipped:.0%} of the slopes were clipped, which bends the estimate: raise "
            "qzo.clip_threshold."
        )
    return text
