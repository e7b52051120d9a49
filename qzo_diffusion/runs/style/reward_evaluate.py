"""Score a run on rewards: base against tuned, on other prompts, at equal seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import nn

from qzo_diffusion.core.merge import merge_changes_
from qzo_diffusion.core.scales import ScaleSet
from qzo_diffusion.evaluate import intervals
from qzo_diffusion.evaluate.reward_scores import SECOND, TRAINED, findings
from qzo_diffusion.runs import build
from qzo_diffusion.runs.style import batches as style_data
from qzo_diffusion.runs.style import pipeline, reward_plan
from qzo_diffusion.runs.style.levels import for_samples
from qzo_diffusion.runs.style.rewards import Rewards
from qzo_diffusion.runs.style.scored_pictures import Kept
from qzo_diffusion.runs.tuned import Tuned

STATES = ("base", "tuned")


@dataclass(frozen=True)
class Drawn:
    """What `Kept.draw` needs of a run."""

    plan: reward_plan.RewardPlan
    encoded: style_data.Encoded
    transformer: nn.Module
    sampled: nn.Module  # the same, as pictures are made with it
    scales: ScaleSet


def measure(plan: reward_plan.RewardPlan, tuned: Tuned, kept: Kept) -> dict[str, Any]:
    """Draw the pictures of both states and return their scores.

    Raises:
        ModelError: the scales belong to another model.
    """
    encoded = style_data.encode(
        plan.config, plan.model_folder, reward_plan.NO_STYLE, plan.prompts, plan.device, plan.dtype
    )
    transformer, scales = pipeline.load_scales(plan.config, plan.runtime)
    tuned.check(build.fingerprints(transformer, scales)[0])
    sampled = for_samples(plan.config, plan.family, transformer, scales)
    work = Drawn(plan, encoded, transformer, sampled, scales)
    pictures = {"base": kept.draw(work, "base")}
    merge_changes_(scales, [(tuned.over(scales), 1.0)])
    pictures["tuned"] = kept.draw(work, "tuned")
    return scored(plan.workshop.build(), pictures, plan.prompts.texts)


def scored(
    rewards: Rewards, pictures: Mapping[str, Sequence[Image.Image]], prompts: Sequence[str]
) -> dict[str, Any]:
    """Return the scores of the states' pictures and their changes, paired over prompts."""
    each = {state: rewards.trained.each(pictures[state], prompts) for state in STATES}
    totals = {state: rewards.trained.total(each[state]) for state in STATES}
    found: dict[str, Any] = {
        TRAINED: _compared(totals) if rewards.trained.rewards else None,
        "each": {
            name: _compared({state: each[state][name] for state in STATES})
            for name in rewards.trained.rewards
        },
        SECOND: None,
    }
    if rewards.second is not None:
        second = rewards.second
        found[SECOND] = {
            "name": next(iter(second.weights)),
            **_compared({state: second(pictures[state], prompts) for state in STATES}),
        }
    return {"prompts": list(prompts), **found, "verdict": _verdict(rewards, found)}


def _compared(values: Mapping[str, list[float]]) -> dict[str, Any]:
    """Return the values of both states, and the change with its interval."""
    base, tuned = (values[state] for state in STATES)
    return {
        "values": {state: list(values[state]) for state in STATES},
        "mean": intervals.summary(tuned)["mean"],
        **intervals.paired(tuned, base),
    }


def _verdict(rewards: Rewards, found: Mapping[str, Any]) -> list[dict[str, str]]:
    second = found[SECOND]
    rows = [
        {key: found[key]["values"][state] for key in (TRAINED, SECOND) if found[key] is not None}
        for state in STATES
    ]
    names = {"rewards": rewards.trained.weights, SECOND: second and second["name"]}
    return findings({**names, "steps": rows})
