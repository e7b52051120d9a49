"""CMA-ES on one number a layer (as Calibri, arXiv 2603.24800) on the same reward, prompts and
sampling as the run of the row compressibility: how many pictures each draws until the reward on
prompts that are not trained has half of the run's final gain.

A candidate is scored on the prompts and noise of one step of the run. All candidates of a
generation see the same ones."""

import argparse
import itertools
import json
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.rewards.runs import trained
from qzo_diffusion.config.files import load_config
from qzo_diffusion.core.grouped import Grouped
from qzo_diffusion.core.parametrize import parametrize
from qzo_diffusion.core.probes import sample_losses
from qzo_diffusion.runs.style.reward_plan import RewardPlan, make_plan
from qzo_diffusion.runs.style.rewarded_pictures import RewardedPictures
from qzo_diffusion.train.distributed import Ranks
from qzo_diffusion.train.run_folder import RunFolder
from qzo_diffusion.train.tracking import Tracker

SPREAD = 0.03  # the first standard deviation of a number, the radius of the run's probes
EVERY = 4  # generations between two scores of prompts that are not trained
BUDGET = 4  # times the pictures of the run; then it is given up


def cma_es(options: argparse.Namespace) -> dict[str, Any]:
    run = trained(options, "compressibility", ["compressibility"])
    config = load_config(run / "config.yaml")
    curve = own_curve(run, config.data.batch_size * config.qzo.num_directions)
    target = curve[0][1] + (curve[-1][1] - curve[0][1]) / 2
    ours = pictures_to_reach(curve, target)
    plan = make_plan(config)
    other = search(plan, curve[-1][0] * BUDGET, options.work / "cma_es")
    theirs = pictures_to_reach(other, target)
    known = ours is not None and theirs is not None
    return {
        "=over_cma_es": ours / theirs if known else None,  # type: ignore[operator]
        "target": target,
        "pictures": ours,
        "cma_es_pictures": theirs,
        "cma_es_limit": other[-1][0],
        "curve": curve,
        "cma_es_curve": other,
    }


def own_curve(run: Path, pictures_of_step: int) -> list[tuple[int, float]]:
    """Return pictures drawn in training and the mean reward of the run's samples."""
    rows = json.loads((run / "rewards.json").read_text())["steps"]
    return [(row["step"] * pictures_of_step, float(np.mean(row["reward"]))) for row in rows]


def pictures_to_reach(curve: Sequence[tuple[int, float]], target: float) -> float | None:
    """Return where the curve first crosses the target, between points on a straight line."""
    for (before, low), (after, high) in itertools.pairwise(curve):
        if low < target <= high:
            return before + (after - before) * (target - low) / (high - low)
    return None


def search(plan: RewardPlan, budget: int, work: Path) -> list[tuple[int, float]]:
    """Run CMA-ES until the budget of pictures is spent; return pictures drawn, and the reward of
    the run's own samples.

    `work` keeps the answers of all candidates, so that a search that was stopped asks for them
    again and goes on.
    """
    import cma

    components, out = plan.load(Ranks()), RunFolder(work)
    (work / "samples").mkdir(parents=True, exist_ok=True)
    shown = components.callbacks(out, Tracker(work, 1, show_progress=False))
    assert isinstance(shown, RewardedPictures)
    theta = parametrize(components.scales, "layer")
    assert isinstance(theta, Grouped)
    sizes = {key: len(one) for key, one in theta.by_axis.items()}

    def changed(numbers: Any) -> AbstractContextManager[None]:
        parts = torch.as_tensor(np.asarray(numbers), dtype=torch.float32).split(
            list(sizes.values())
        )
        return components.scales.override(theta.shifted(dict(zip(sizes, parts, strict=True))))

    def of_step(numbers: Any, step: int) -> float:
        """The mean reward on the prompts and noise of a step."""
        with changed(numbers):
            parts = components.batches(step).micro_batches
            losses = [loss for part in parts for loss in sample_losses(components.objective, part)]
        return -math.fsum(losses) / len(losses)

    def held_out(numbers: Any) -> float:
        with changed(numbers):
            return float(np.mean(shown.rewards.trained(shown.sampler.images(), shown.prompts)))

    batch, count = plan.config.data.batch_size, sum(sizes.values())
    strategy = cma.CMAEvolutionStrategy(np.zeros(count), SPREAD, {"seed": 1, "verbose": -9})
    kept = work / "answers.json"
    answers = json.loads(kept.read_text()) if kept.is_file() else []
    curve, drawn, generation = [(0, held_out(np.zeros(count)))], 0, 0
    while drawn < budget:
        candidates = strategy.ask()
        if generation == len(answers):
            answers.append([of_step(one, generation) for one in candidates])
            kept.write_text(json.dumps(answers))
        strategy.tell(candidates, [-value for value in answers[generation]])
        generation, drawn = generation + 1, drawn + batch * len(candidates)
        if generation % EVERY == 0:
            curve.append((drawn, held_out(strategy.mean)))
    return curve
