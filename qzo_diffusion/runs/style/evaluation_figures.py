"""The figures of evaluation.json, of what an evaluation measured."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from qzo_diffusion.config.style import Config
from qzo_diffusion.core.errors import DataError, OutputError
from qzo_diffusion.diffusion.flow_matching import Batch
from qzo_diffusion.diffusion.masks import visible_image
from qzo_diffusion.diffusion.sample import Sample
from qzo_diffusion.diffusion.sampling import cells, load_picture
from qzo_diffusion.evaluate import clip_score, intervals, scorer, signal, style
from qzo_diffusion.evaluate.scorer import Scorer
from qzo_diffusion.evaluate.verdict import BASE
from qzo_diffusion.runs import report as report_run
from qzo_diffusion.runs.style import batches as style_data
from qzo_diffusion.runs.style import plan as style_run
from qzo_diffusion.runs.style.evaluation import Measured

BEGUN = "what the run began with"
NO_NUMBER = (
    "The estimate can't be measured: slopes along random directions are no finite numbers; lower "
    "train.lr."
)


def results(
    plan: style_run.StylePlan,
    held_out: Sequence[Batch],
    measured: Measured,
    chosen: Scorer,
    folder: Path,
    contents: Sequence[str],
) -> dict[str, Any]:
    """Return the figures of evaluation.json, without its verdict."""
    metrics = report_run.read_metrics(folder)
    trained = [visible_image(sample) for sample in plan.style.train]
    features = chosen.image_features(trained)
    found: dict[str, Any] = {
        "compared_with": BEGUN if "begun" in measured.pictures else BASE,
        "begins_with": "another run's scales" if plan.config.init_from else "the base",
        "scorer": {"name": chosen.name, "note": chosen.note} | scorer.suits(chosen.note, trained),
        "sampling": {
            "seed": plan.config.sample.seed,
            "steps": plan.config.sample.steps,
            "guidance": plan.config.sample.guidance,
            **_levels(plan.config),
        },
        **_scores(chosen, plan, measured.pictures, contents, features),
        "validation_loss": _held_out_loss(plan.style.validation, held_out, measured.losses),
        "signal": {**measured.signals, **signal.of_metrics(metrics), "moved": measured.moved},
        "steps": _scores_of_steps(chosen, folder, plan, features),
        "unusable": [{"file": file, "reason": reason} for file, reason in plan.style.bad],
    }
    base = measured.signals["base"]
    found["signal"]["sentence"] = (
        signal.sentence(base, found["signal"]["clipped"])
        if math.isfinite(base["agreement"])
        else NO_NUMBER
    )
    return found


def _levels(config: Config) -> dict[str, Any]:
    """Return the noise levels at which pictures use the tuned scales, unless they are all."""
    levels = config.sample.tuned_between
    return {} if levels is None else {"tuned_between": levels}


def content_of(prompt: str, plan: style_run.StylePlan) -> str:
    """Return the content that a picture must show.

    Raises:
        DataError: the prompt names nothing but style.
    """
    trigger = plan.trigger.word if plan.trigger else plan.config.data.trigger
    content = clip_score.content_of(prompt, trigger)
    if not content:
        raise DataError(
            f"the prompt {prompt!r}, which is nothing but style",
            "a prompt with something to show",
            "write what the picture must hold beside the style",
        )
    return content


def _scores(
    chosen: Scorer,
    plan: style_run.StylePlan,
    pictures: Mapping[str, Sequence[Image.Image]],
    contents: Sequence[str],
    trained: Tensor,
) -> dict[str, Any]:
    features = {state: chosen.image_features(images) for state, images in pictures.items()}
    held_out = torch.empty(0, trained.shape[1])
    if plan.style.validation:
        held_out = chosen.image_features(
            [visible_image(sample) for sample in plan.style.validation]
        )
    texts = chosen.text_features(contents)
    clip = [clip_score.cosines(one, texts) for one in features.values()]
    similar = [style.similarity(one, trained) for one in features.values()]
    rows = [
        {
            "prompt": prompt,
            "content": content,
            "trigger": plan.trigger is not None and plan.trigger.is_in(prompt),
            "clip": [state[index] for state in clip],
            "style": [state[index] for state in similar],
        }
        for index, (prompt, content) in enumerate(zip(plan.sample_prompts, contents, strict=True))
    ]
    tuned, base, begun = (features.get(state) for state in ("tuned", "base", "begun"))
    assert tuned is not None
    names = [sample.id for sample in plan.style.train]
    return {
        "prompts": rows,
        "trigger": _by_trigger(plan, rows),
        "clip_score": clip_score.score(chosen, tuned, contents, base, begun),
        "style": style.score(style.Pictures(tuned, base, begun), trained, names, held_out),
    }


def _by_trigger(
    plan: style_run.StylePlan, rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """Return similarity and content of the prompts with the captions' trigger, and of those
    without.
    """
    if plan.trigger is None:
        return None
    found: dict[str, Any] = {"word": plan.trigger.word}
    for name, wanted in (("with", True), ("without", False)):
        chosen = [row for row in rows if row["trigger"] == wanted]
        found[name] = {"n": len(chosen)} | (
            {key: _changes([row[key] for row in chosen]) for key in ("style", "clip")}
            if chosen
            else {}
        )
    return found


def _changes(values: Sequence[Sequence[float]]) -> dict[str, object]:
    """Return the changes from values [base, (begun,) tuned] of each prompt."""
    base, *begun, tuned = (list(column) for column in zip(*values, strict=True))
    before = begun[0] if begun else None
    return {"mean": sum(tuned) / len(tuned), **intervals.gained(tuned, base, before)}


def _held_out_loss(
    samples: Sequence[Sample], batches: Sequence[Batch], losses: Mapping[str, Sequence[float]]
) -> dict[str, Any] | None:
    """Compare the states on the same images, noise and noise levels, in all and by level.

    Intervals are over images.
    """
    if not batches:
        return None
    ids = style_data.validation_order(samples)
    levels = [round(float(level), 6) for batch in batches for level in batch.sigma]

    def entry(chosen: Sequence[int]) -> dict[str, Any]:
        parts = {state: [own[index] for index in chosen] for state, own in losses.items()}
        tuned, clusters = parts["tuned"], [ids[index] for index in chosen]
        found = intervals.gained(tuned, parts["base"], parts.get("begun"), clusters)
        means = {state: found.pop(f"{state}_mean") for state in parts if state != "tuned"}
        return {**means, "tuned": sum(tuned) / len(tuned), "n": len(chosen), **found}

    bands = [
        {"sigma": level, **entry([index for index, own in enumerate(levels) if own == level])}
        for level in sorted(set(levels))
    ]
    return {**entry(range(len(levels))), "images": len(set(ids)), "bands": bands}


def _scores_of_steps(
    chosen: Scorer, folder: Path, plan: style_run.StylePlan, trained: Tensor
) -> list[dict[str, Any]]:
    """Score the run's own sample grids step by step: similarity to the style and match of the
    prompts, with intervals over prompts.
    """
    prompts = report_run.grid_prompts(folder)
    columns = report_run.step_grids(folder)
    if not columns or not prompts:
        return []
    trigger = plan.trigger.word if plan.trigger else plan.config.data.trigger
    texts = chosen.text_features(
        [clip_score.content_of(prompt, trigger) or prompt for prompt in prompts]
    )
    rows = []
    for step, column in columns:
        try:
            features = chosen.image_features(cells(load_picture(column), len(prompts)))
        except (OSError, ValueError) as error:
            raise OutputError(
                f"{column} can't be used: {error}", "the grid as the run wrote it", "delete it"
            ) from None
        rows.append(
            {
                "step": step,
                "similarity": intervals.summary(style.similarity(features, trained)),
                "clip_score": intervals.summary(clip_score.cosines(features, texts)),
            }
        )
    return rows
