"""What `qzo-diffuse evaluate --run` does: base against tuned at equal prompts and seeds, and
everything that follows from it.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from qzo_diffusion import resources
from qzo_diffusion.config.files import load_config
from qzo_diffusion.config.style import Config
from qzo_diffusion.console import report
from qzo_diffusion.core.dense import Dense
from qzo_diffusion.core.errors import DataError, OutputError
from qzo_diffusion.core.grouped import Grouped
from qzo_diffusion.core.merge import merge_changes_
from qzo_diffusion.core.parametrization import Parametrization
from qzo_diffusion.core.probes import sample_losses
from qzo_diffusion.core.scales import ScaleSet
from qzo_diffusion.diffusion.flow_matching import Batch, velocity_loss
from qzo_diffusion.diffusion.images import open_image
from qzo_diffusion.diffusion.sampling import cells, load_picture
from qzo_diffusion.diffusion.style_folder import Sample
from qzo_diffusion.evaluate import clip_score, intervals, signal, style
from qzo_diffusion.evaluate import compare as comparison
from qzo_diffusion.evaluate.scorer import DEFAULT_SCORER, EMBEDDED, Scorer, load_scorer
from qzo_diffusion.evaluate.verdict import verdict
from qzo_diffusion.files import prepare_file, write_folder
from qzo_diffusion.quant.load import handles_of
from qzo_diffusion.runs import build
from qzo_diffusion.runs import report as report_run
from qzo_diffusion.runs.locate import locate
from qzo_diffusion.runs.style import batches as style_data
from qzo_diffusion.runs.style import pipeline
from qzo_diffusion.runs.style import plan as style_run
from qzo_diffusion.runs.tuned import load_tuned
from qzo_diffusion.train.distributed import Ranks
from qzo_diffusion.train.run_folder import RunFolder

EVALUATION, PICTURES = "evaluation.json", "evaluation"
AFFORDABLE = 200_000_000  # parameters of a model whose backward pass is asked for


@dataclass(frozen=True)
class EvaluateRequest:
    """None takes the run's own: its score prompts by model, its style folder, the scorer that suits
    its model.
    """

    run: Path
    prompts: str | None = None
    style_dir: Path | None = None
    scorer: str | None = None
    output: Path | None = None


@dataclass
class _Work:
    """The model of the run, with its scales at the base or as tuned, and what it is measured on."""

    plan: style_run.StylePlan
    encoded: style_data.Encoded
    transformer: nn.Module
    scales: ScaleSet
    theta: Parametrization
    held_out: list[Batch]

    def objective(self, batch: Batch) -> torch.Tensor:
        return velocity_loss(self.transformer, batch, self.plan.dtype)


def run(request: EvaluateRequest) -> dict[str, Any]:
    """Score the run, write evaluation.json and bring its report.html up to date; of a checkpoint,
    what `_evaluation_of` names.

    Raises:
        DataError: no prompt, or a prompt that is nothing but style. ConfigError, ModelError: the
            scorer.
        OutputError: the run was not finished, its scales are damaged, or the output can't be
            written.
    """
    folder = locate(request.run).need("style").run()
    target = request.output or _evaluation_of(request.run)
    prepare_file(target)
    config = _config(request, folder)
    found = load_tuned(request.run)
    plan = style_run.make_plan(config)
    contents = [_content(prompt, config.data.trigger) for prompt in plan.sample_prompts]
    device = plan.device
    name = request.scorer or default_scorer(plan.model_folder)
    scorer = load_scorer(name, device, resources.embedded_scorer())

    work = _load(plan)
    found.check(build.fingerprints(work.transformer, work.scales)[0])
    tuned = found.over(work.scales)
    start = {
        layer: scales.detach().clone().cpu() for layer, scales in work.scales.tensors().items()
    }
    metrics = report_run.read_metrics(folder)
    # calibrated, if the run's was
    peak = max((line["lr"] for line in metrics if "lr" in line), default=config.train.lr)
    pictures, losses, signals = {}, {}, {}
    for state, scales in (("base", None), ("tuned", tuned)):
        if scales is not None:
            merge_changes_(work.scales, [(scales, 1.0)])
        pictures[state] = _pictures(request.run, work, state)
        losses[state] = [sample_losses(work.objective, batch) for batch in work.held_out]
        signals[state] = _signal(work, peak)
    results: dict[str, Any] = {
        "run": str(folder),
        "step": int(found.facts.get("qzo.steps", 0)),
        "scorer": {"name": scorer.name, "note": scorer.note},
        "sampling": {
            "seed": config.sample.seed,
            "steps": plan.config.sample.steps,
            "guidance": plan.config.sample.guidance,
        },
        **_scores(scorer, plan, pictures, contents),
        "validation_loss": _held_out_loss(plan.style.validation, work.held_out, losses),
        "signal": {
            **signals,
            **signal.of_metrics(metrics),
            "moved": signal.moved(start, tuned) if config.qzo.parametrization != "codes" else [],
        },
        "steps": _scores_of_steps(scorer, folder, plan),
        "unusable": [{"file": file, "reason": reason} for file, reason in plan.style.bad],
    }
    results["signal"]["sentence"] = signal.sentence(signals["base"], results["signal"]["clipped"])
    results["verdict"] = verdict(results)
    RunFolder(target.parent).write_json(target.name, results)
    if request.output is None and request.run == folder:  # the page shows the finished run
        report_run.write(folder)
    return results


def _evaluation_of(path: Path) -> Path:
    """evaluation.json of a run; a checkpoint of it has a file of its own beside it,
    evaluation_step_NNNNNN.json.
    """
    found = locate(path)
    own = EVALUATION if found.step is None else f"evaluation_step_{found.step:06d}.json"
    return found.run() / own


def default_scorer(model_folder: Path) -> str:
    return EMBEDDED if pipeline.is_tiny(model_folder) else DEFAULT_SCORER


def _config(request: EvaluateRequest, folder: Path) -> Config:
    config: Config = load_config(folder / "config.yaml")
    if request.style_dir is not None:
        config.data.style_dir, config.data.validation_dir = str(request.style_dir), None
    model_folder, _ = pipeline.choose_model(config.model)
    config.sample.prompts = request.prompts or (
        "tiny_score.txt" if pipeline.is_tiny(model_folder) else "score.txt"
    )
    return config


def _content(prompt: str, trigger: str | None) -> str:
    content = clip_score.content_of(prompt, trigger)
    if not content:
        remedy = "write what the picture must hold beside the style"
        raise DataError(
            f"the prompt {prompt!r}, which is nothing but style",
            "a prompt with something to show",
            remedy,
        )
    return content


def _load(plan: style_run.StylePlan) -> _Work:
    config = plan.config
    encoded = style_data.encode(
        config, plan.model_folder, plan.style, plan.prompts, plan.device, plan.dtype
    )
    runtime = pipeline.Runtime(plan.model_folder, plan.device, plan.dtype)
    transformer, scales, theta = pipeline.load_base(config, runtime)
    held_out = style_data.validation_batches(
        plan.style.validation, encoded, plan.device, config.data.batch_size, config.train.seed
    )
    return _Work(plan, encoded, transformer, scales, theta, held_out)


def _pictures(path: Path, work: _Work, state: str) -> list[Image.Image]:
    """Pictures of all prompts, kept in the run's `evaluation/`, so that another scorer sees the
    same ones without sampling.

    Those of a checkpoint are kept in `evaluation/step_NNNNNN/`, unless the run's own are the same,
    as the base's often are."""
    config, plan = work.plan.config, work.plan
    shown = [
        [*plan.sample_prompts, *plan.prompts.negatives],
        config.sample.model_dump(),
        config.data.resolution,
        str(plan.dtype),
    ]
    scales = build.fingerprints(work.transformer, work.scales)
    key = hashlib.blake2b(
        json.dumps([shown, scales], default=str).encode(), digest_size=8
    ).hexdigest()
    found = locate(path)
    own = found.run() / PICTURES / state
    step = None if found.step is None else f"step_{found.step:06d}"
    target = own if step is None else found.run() / PICTURES / step / state
    files = [f"{index:03d}.png" for index in range(len(plan.sample_prompts))]
    if _kept(own, key, files):
        target = own
    elif not _kept(target, key, files):
        encoded = work.encoded
        sampler = pipeline.sampler(
            config,
            plan.model_folder,
            work.transformer,
            encoded.vae,
            plan.prompts.prompts,
            encoded.prompts,
            plan.device,
            plan.dtype,
        )
        report(f"sampling {len(files)} pictures: {state}")
        images = sampler.images()

        def write(aside: Path) -> None:
            for image, file in zip(images, files, strict=True):
                image.save(aside / file)
            table = [
                {"file": file, **prompt.row}
                for file, prompt in zip(files, plan.prompts.prompts, strict=True)
            ]
            RunFolder(aside).write_json("prompts.json", table)
            RunFolder(aside).write_json("key.json", key)

        write_folder(target, write)
    return [load_picture(target / file) for file in files]


def _kept(target: Path, key: str, files: Sequence[str]) -> bool:
    try:
        same = json.loads((target / "key.json").read_text()) == key
    except (OSError, ValueError):
        return False
    return same and all((target / file).is_file() for file in files)


def _scores(
    scorer: Scorer,
    plan: style_run.StylePlan,
    pictures: dict[str, list[Image.Image]],
    contents: list[str],
) -> dict[str, Any]:
    tuned, base = scorer.image_features(pictures["tuned"]), scorer.image_features(pictures["base"])
    trained = scorer.image_features([open_image(sample.path).image for sample in plan.style.train])
    held_out = torch.empty(0, trained.shape[1])
    if plan.style.validation:
        held_out = scorer.image_features(
            [open_image(sample.path).image for sample in plan.style.validation]
        )
    names = [sample.id for sample in plan.style.train]
    texts = scorer.text_features(contents)
    columns = [
        clip_score.cosines(base, texts),
        clip_score.cosines(tuned, texts),
        style.similarity(base, trained),
        style.similarity(tuned, trained),
    ]
    return {
        "prompts": [
            {"prompt": prompt, "content": content, "clip": [a, b], "style": [c, d]}
            for prompt, content, a, b, c, d in zip(
                plan.sample_prompts, contents, *columns, strict=True
            )
        ],
        "clip_score": clip_score.score(scorer, tuned, contents, base),
        "style": style.score(tuned, trained, names, held_out, base),
    }


def _held_out_loss(
    samples: Sequence[Sample], batches: Sequence[Batch], losses: dict[str, list[list[float]]]
) -> dict[str, Any] | None:
    """Base and tuned on the same images, noise and noise levels, and per noise level; intervals
    over images.
    """
    if not batches:
        return None
    ids = style_data.validation_order(samples)
    levels = [round(float(level), 6) for batch in batches for level in batch.sigma]
    flat = {state: [loss for part in parts for loss in part] for state, parts in losses.items()}

    def entry(chosen: Sequence[int]) -> dict[str, Any]:
        tuned, base = ([flat[state][index] for index in chosen] for state in ("tuned", "base"))
        difference = intervals.paired(tuned, base, [ids[index] for index in chosen])
        mean = sum(tuned) / len(tuned)
        return {"base": difference.pop("base_mean"), "tuned": mean, "n": len(chosen), **difference}

    bands = [
        {"sigma": level, **entry([index for index, own in enumerate(levels) if own == level])}
        for level in sorted(set(levels))
    ]
    return {**entry(range(len(levels))), "images": len(set(ids)), "bands": bands}


def _signal(work: _Work, lr: float) -> dict[str, Any]:
    """At the scales as they are now, on batches of steps that come after the run's last; `lr` for
    the size of a step.
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
    if (
        isinstance(work.theta, Dense | Grouped)
        and parameters <= AFFORDABLE
        and config.qzo.units == "relative"
    ):
        handles = handles_of(work.transformer)
        found["exact"] = signal.exact_cosine(work.objective, first, work.theta, handles, estimates)
    return found


def _scores_of_steps(
    scorer: Scorer, folder: Path, plan: style_run.StylePlan
) -> list[dict[str, Any]]:
    """The run's own sample grids, step by step: similarity to the style and CLIP score, with
    intervals over prompts.
    """
    prompts = report_run.grid_prompts(folder)
    columns = sorted((folder / "samples").glob("step_*.png"))
    if not columns or not prompts:
        return []
    trained = scorer.image_features([open_image(sample.path).image for sample in plan.style.train])
    texts = scorer.text_features(
        [clip_score.content_of(prompt, plan.config.data.trigger) or prompt for prompt in prompts]
    )
    rows = []
    for column in columns:
        try:
            features = scorer.image_features(cells(load_picture(column), len(prompts)))
        except (OSError, ValueError) as error:
            raise OutputError(
                f"{column} can't be used: {error}", "the grid as the run wrote it", "delete it"
            ) from None
        rows.append(
            {
                "step": int(column.stem.removeprefix("step_")),
                "similarity": intervals.summary(style.similarity(features, trained)),
                "clip_score": intervals.summary(clip_score.cosines(features, texts)),
            }
        )
    return rows


def compare(runs: Sequence[Path], output: Path | None = None) -> tuple[dict[str, Any], str]:
    """The evaluations of several runs side by side: figures for a script, and a table for a person.

    Raises:
        OutputError: a run that was not evaluated, or is no run on images; the output can't be
            written.
    """
    if output is not None:
        prepare_file(output)
    found = {}
    for path in runs:
        file = path if path.is_file() else _evaluation_of(path)
        try:
            found[str(path)] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            remedy = f"qzo-diffuse evaluate --run {path}"
            raise OutputError(
                f"no evaluation of {path}: {error}", "a run that was evaluated", remedy
            ) from None
        comparison.check(file, found[str(path)])
    rows, warnings = comparison.rows(found), comparison.warnings(found)
    results = {"runs": rows, "warnings": warnings}
    if output is not None:
        RunFolder(output.parent).write_json(output.name, results)
    return results, "\n".join([comparison.table(rows), *(f"note: {text}" for text in warnings)])
