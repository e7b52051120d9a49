"""QLoRA (arXiv 2305.14314) as a line of reference: adapters of rank 8 beside every quantized layer
of a picture model, by Adam on their exact gradient. The package has it for language models alone.
"""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.content.cells import Curve, before_and_after
from qzo_diffusion import resources
from qzo_diffusion.config.files import make_config
from qzo_diffusion.core.absolute import DenseAbsolute
from qzo_diffusion.core.errors import TrainingDiverged
from qzo_diffusion.core.optimizer import Adam
from qzo_diffusion.core.spsa import mean_loss
from qzo_diffusion.diffusion.masks import visible_image
from qzo_diffusion.evaluate import clip_score, style
from qzo_diffusion.evaluate.scorer import load_scorer
from qzo_diffusion.llm.baselines import add_lora_, lora_gradient, lora_theta
from qzo_diffusion.runs.style import evaluation
from qzo_diffusion.runs.style.batches import TrainingBatches
from qzo_diffusion.runs.style.choose_model import default_scorer, shipped_prompts
from qzo_diffusion.runs.style.evaluation_figures import content_of
from qzo_diffusion.runs.style.plan import StylePlan, make_plan
from qzo_diffusion.runs.style.scored_pictures import Kept
from qzo_diffusion.train.distributed import Ranks


@dataclass(frozen=True)
class Trained:
    """The held-out losses of a run of adapters, and the scores of its best step's pictures."""

    curve: Curve
    pictures: dict[str, Any]


def train(settings: dict[str, Any], place: Path) -> Trained:
    """Train adapters by the settings of `qzo-diffuse train`, whose `adapters` says which.

    Args:
        place: folder of the pictures of the base and of the best step; it is emptied.

    Raises:
        TrainingDiverged: a held-out loss is not finite.
    """
    shutil.rmtree(place, ignore_errors=True)  # its pictures do not depend on scales alone
    adapters = settings["adapters"]
    config = make_config({key: value for key, value in settings.items() if key != "adapters"})
    config.sample.prompts = shipped_prompts(resources.tiny_model(), "score")
    plan = make_plan(config)
    work, kept = evaluation.load(plan), Kept(place, place)
    drawn = {"base": kept.draw(work, "base")}
    model, seed = work.transformer, config.train.seed
    add_lora_(model, list(work.scales), seed=seed, **adapters)
    theta, gradient, optimizer = lora_theta(model), lora_gradient(model), Adam()
    batches = TrainingBatches(config, plan.style.train, work.encoded, plan.device, Ranks())
    best, curve = _state(theta), Curve()
    for step in range(config.train.max_steps + 1):
        if step % config.train.validate_every == 0:
            with theta.scales.override(theta.perturbed()):
                curve.append((step, mean_loss(work.objective, work.held_out)))
            if not math.isfinite(curve[-1][1]):
                raise TrainingDiverged(
                    "a loss that is not finite", "finite numbers", "a lower rate"
                )
            if curve[-1][1] == min(loss for _, loss in curve):
                best = _state(theta)
        if step < config.train.max_steps:
            slopes = gradient(work.objective, batches(step).micro_batches, theta)
            optimizer.descend_(theta, slopes, config.train.lr)
    theta.load_state_(best)
    with theta.scales.override(theta.perturbed()):
        drawn["tuned"] = kept.draw(work, "tuned")
    return Trained(curve, _scores(plan, drawn))


def _state(theta: DenseAbsolute) -> dict[str, Tensor]:
    return {name: one.clone() for name, one in theta.state().items()}


def _scores(plan: StylePlan, drawn: dict[str, Any]) -> dict[str, Any]:
    """Content and style of the base's and the tuned pictures, as in `qzo-diffuse evaluate`."""
    scorer = load_scorer(
        default_scorer(plan.model_folder), plan.device, resources.embedded_scorer()
    )
    base, tuned = (scorer.image_features(drawn[state]) for state in ("base", "tuned"))
    trained = scorer.image_features([visible_image(sample) for sample in plan.style.train])
    contents = [content_of(one, plan) for one in plan.sample_prompts]
    content = clip_score.score(scorer, tuned, contents, base)
    names = [sample.id for sample in plan.style.train]
    of_style = style.score(style.Pictures(tuned, base, None), trained, names, trained[:0])
    found: dict[str, Any] = {"content": content, "style": of_style["similarity"]}
    return {key: before_and_after(one, one["base_mean"], one["mean"]) for key, one in found.items()}
