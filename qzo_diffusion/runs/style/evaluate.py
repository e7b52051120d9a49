"""Evaluate a run for `qzo-diffuse evaluate --run`: compare base and tuned model at equal prompts
and seeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qzo_diffusion import devices, resources
from qzo_diffusion.config.files import load_config
from qzo_diffusion.config.reward import RewardConfig
from qzo_diffusion.config.style import Config
from qzo_diffusion.core.errors import DataError, OutputError
from qzo_diffusion.diffusion.flow_matching import Batch
from qzo_diffusion.evaluate import compare as comparison
from qzo_diffusion.evaluate.scorer import check_scorer, load_scorer
from qzo_diffusion.evaluate.verdict import diverged, verdict
from qzo_diffusion.runs import report as report_run
from qzo_diffusion.runs.locate import locate
from qzo_diffusion.runs.style import evaluation, evaluation_figures, reward_evaluate, reward_plan
from qzo_diffusion.runs.style import plan as style_run
from qzo_diffusion.runs.style.choose_model import choose_model, default_scorer, shipped_prompts
from qzo_diffusion.runs.style.levels import with_levels
from qzo_diffusion.runs.style.samples import report_reading
from qzo_diffusion.runs.style.scored_pictures import Kept
from qzo_diffusion.runs.tuned import Tuned, load_tuned
from qzo_diffusion.system.console import report
from qzo_diffusion.system.files import COMPLETE, finite, prepare_file
from qzo_diffusion.system.reading import read_json
from qzo_diffusion.train.run_folder import RunFolder

EVALUATION, PICTURES = "evaluation.json", "evaluation"


@dataclass(frozen=True)
class EvaluateRequest:
    """Settings of an evaluation.

    None takes the run's own: its score prompts, its style folder, and the scorer that suits its
    model.
    """

    run: Path
    prompts: str | None = None
    style_dir: Path | None = None
    scorer: str | None = None
    output: Path | None = None
    model: str | None = None  # for a delta, which names a local model without its folder
    tuned_between: Sequence[float] | None = None


@dataclass(frozen=True)
class Place:
    """The folder whose config.yaml describes `path`, and the folder of its scores.

    The files of an export are hashed, so its scores lie beside it.
    """

    path: Path
    folder: Path
    step: str  # the checkpoint's name; empty for the end of a run and for an export

    @classmethod
    def of(cls, path: Path) -> "Place":
        """Find the place of a run, checkpoint or delta.

        Raises:
            OutputError: there is none.
            ConfigError: it is of another kind of run.
        """
        found = locate(path).need("style")
        return cls(path, found.run(), "" if found.step is None else f"step_{found.step:06d}")

    @property
    def is_export(self) -> bool:
        return (self.folder / COMPLETE).is_file()

    @property
    def scores(self) -> Path:
        return report_run.scores_folder(self.folder)

    @property
    def evaluation(self) -> Path:
        return self.scores / (f"evaluation_{self.step}.json" if self.step else EVALUATION)

    @property
    def reward_evaluation(self) -> Path:
        name = f"reward_{EVALUATION}"
        return self.scores / (f"reward_evaluation_{self.step}.json" if self.step else name)

    @property
    def kept(self) -> Kept:
        own = self.scores / PICTURES
        return Kept(own, own / self.step if self.step else own)


def run(request: EvaluateRequest) -> dict[str, Any]:
    """Score the run, write evaluation.json and update its report.html.

    The scores of a checkpoint go to evaluation_step_NNNNNN.json; those of an exported delta go to
    DELTA-evaluation/ beside it.

    Raises:
        DataError: no prompt, or a prompt that names nothing but style.
        ConfigError, ModelError: the scorer can't be used.
        OutputError: the run was not finished, its scales are damaged, or the output can't be
            written.
    """
    place = Place.of(request.run)
    config = _config(request, place)
    of_rewards = bool(config.reward.scores)
    target = request.output or (place.reward_evaluation if of_rewards else place.evaluation)
    prepare_file(target)
    if of_rewards:
        return _of_rewards(request, place, config, target)
    tuned = load_tuned(request.run)
    plan = style_run.make_plan(config)
    report_reading(plan.prompts)
    contents = [evaluation_figures.content_of(prompt, plan) for prompt in plan.sample_prompts]
    name = request.scorer or default_scorer(plan.model_folder)
    check_scorer(name, resources.embedded_scorer())
    measured, held_out = _measured(plan, tuned, place)
    devices.release(plan.device)  # a small card has no room for the model and the scorer
    scorer = load_scorer(name, plan.device, resources.embedded_scorer())
    found = evaluation_figures.results(plan, held_out, measured, scorer, place.folder, contents)
    results = _with_verdict(found, place.folder, int(tuned.facts.get("qzo.steps", 0)))
    RunFolder(target.parent).write_json(target.name, results)
    if request.output is None and not (place.is_export or place.step):
        report_run.write(place.folder)  # the page shows the finished run
    return results


def _measured(
    plan: style_run.StylePlan, tuned: Tuned, place: Place
) -> tuple[evaluation.Measured, list[Batch]]:
    """Return the pictures and losses of all states, and the held-out batches. Frees the model."""
    work = evaluation.load(plan)
    rates = [line["lr"] for line in report_run.read_metrics(place.folder) if "lr" in line]
    # the calibrated rate, if the run has one
    lr = max(rates, default=plan.config.train.lr)
    states = evaluation.states_of(work, tuned)
    return evaluation.measure(work, states, place.kept.draw, lr), work.held_out


def _of_rewards(
    request: EvaluateRequest, place: Place, config: Config, target: Path
) -> dict[str, Any]:
    """Score a run on rewards, whose figures are others, and write them."""
    if request.scorer is not None:
        config.reward.scorer = request.scorer
    config.reward.prompts = config.sample.prompts  # those of training need not be here
    tuned = load_tuned(request.run)
    plan = reward_plan.make_plan(config)
    report_reading(plan.prompts)
    found = reward_evaluate.measure(plan, tuned, place.kept)
    head = {"run": str(place.folder), "step": int(tuned.facts.get("qzo.steps", 0))}
    results: dict[str, Any] = finite({**head, **found})
    RunFolder(target.parent).write_json(target.name, results)
    return results


def _with_verdict(found: dict[str, Any], folder: Path, step: int) -> dict[str, Any]:
    """Return the figures as JSON can hold them, with the verdict on top."""
    sentences = verdict(found)
    head = {"sentence": sentences[0]["text"], "verdict": sentences, "run": str(folder)}
    whole: dict[str, Any] = finite({**head, "step": step, "diverged": diverged(found), **found})
    return whole


def _config(request: EvaluateRequest, place: Place) -> Config:
    own: Config = load_config(place.folder / "config.yaml")
    config = with_levels(own, request.tuned_between)
    if request.style_dir is not None:
        config.reward = RewardConfig()  # scored as a style
        config.data.style_dir, config.data.validation_dir = str(request.style_dir), None
    elif place.is_export and not config.reward.scores:
        _find_images_(config, place)
    # the style's own loss and signal are measured, so the prior's pictures need not be there
    off: dict[str, Any] = {"weight": 0.0, "prompts": None, "dir": None, "batch_size": None}
    config.prior = config.prior.model_copy(update=off)
    config.model = request.model or config.model
    model_folder, _ = choose_model(config.model)
    config.sample.prompts = request.prompts or shipped_prompts(model_folder, "score")
    return config


def _find_images_(config: Config, place: Place) -> None:
    """Find the images of an export, which names their folders without a path."""
    data, beside = config.data, place.folder.absolute().parent

    def found(name: str | None) -> str | None:
        places = [resources.find_file(name or "", "demo_images"), beside / (name or "")]
        return next((str(one) for one in places if name and one.is_dir()), None)

    named, data.style_dir = data.style_dir, found(data.style_dir)
    data.validation_dir = found(data.validation_dir)
    if data.style_dir is None:
        raise DataError(
            f"{place.path}, which does not say where the style's images ({named!r}) are",
            "the folder of images that it was tuned on",
            f"qzo-diffuse evaluate --run {place.path} --style-dir DIR",
        )
    report(f"images of the style: {data.style_dir}")


def compare(runs: Sequence[Path], output: Path | None = None) -> tuple[dict[str, Any], str]:
    """Return the evaluations of several runs: figures for a script, and a table for a person.

    Raises:
        OutputError: a run was not evaluated, or is not a run on images; the output can't be
            written.
    """
    if output is not None:
        prepare_file(output)
    found = {}
    for path in runs:
        file = path if path.is_file() else Place.of(path).evaluation
        try:
            found[str(path)] = finite(read_json(file))
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
