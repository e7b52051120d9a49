"""Write one self-contained page on a run: the changes, their intervals, and everything that is
needed to repeat the run.
"""

import base64
import functools
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from PIL import Image

from qzo_diffusion.evaluate import charts
from qzo_diffusion.evaluate.reward_scores import findings, score_charts
from qzo_diffusion.evaluate.scorer import content_name
from qzo_diffusion.evaluate.task_score import TaskScore
from qzo_diffusion.evaluate.verdict import of_task, verdict
from qzo_diffusion.system import escape

TEMPLATE = "report.html.jinja"
# sides of embedded pictures, in pixels: a page is small enough to send; the run's files stay whole
LARGEST_SIDE = 384
MOST_STEPS = 12  # steps whose pictures are embedded, the first and the last among them
LOSSLESS_SIDE = 128


@dataclass(frozen=True)
class Subject:
    """Pictures of one prompt by label ("step 400", "base"), all with the same seed. `notes` are
    shown below them.
    """

    prompt: str
    pictures: Mapping[str, Image.Image]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class RunFacts:
    """The content of a run's folder. `runs.report` reads it.

    Lists may be empty while a run is young.
    """

    name: str
    step: int
    max_steps: int
    finished: bool
    subjects: Sequence[Subject] = ()
    scored: Sequence[Subject] = ()
    metrics: Sequence[Mapping[str, Any]] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    dataset: Sequence[Mapping[str, Any]] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    journal: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] | None = None
    task_score: TaskScore | None = None  # set for a language model
    rewards: Mapping[str, Any] | None = None  # rewards.json of a run on rewards
    written: str = ""
    style: Sequence[Subject] = ()  # the style's own images, by caption
    costs: Mapping[str, str] = field(default_factory=dict)  # device, minutes, peak memory
    next: Sequence[tuple[str, str]] = ()  # purpose and command
    final_step: int | None = None  # the step whose scales are the result, if the run says it
    prompts_note: str = ""  # names the prompts that hold the captions' trigger


def render(facts: RunFacts) -> str:
    """Return the page as HTML. It loads nothing from a network, and its own policy forbids it to.

    Raises:
        ValueError: figures of another shape than `evaluate` writes.
    """
    from jinja2 import UndefinedError

    try:
        return _template().render(
            run=facts,
            galleries=_galleries(facts),
            charts=_charts(facts),
            figures=_figures(facts),
            verdict=_verdict(facts),
            style=[
                (one.prompt, data_url(image))
                for one in facts.style
                for image in one.pictures.values()
            ],
            content=_content_name(facts),
            settings=_flat(facts.settings),
            environment=_flat(facts.environment),
        )
    except (UndefinedError, KeyError, TypeError) as error:
        raise ValueError(f"no such figure: {error}") from error


@functools.cache
def _template() -> Any:
    """Compile the template once: a run writes its page after every sample."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters |= {
        "figure": figure,
        "interval": interval,
        "percent": percent,
        "cell": cell,
    }
    return environment.get_template(TEMPLATE)


def _shown(value: Any) -> Any:
    """Escape control characters; Jinja escapes the rest of HTML."""
    return escape.one_line(value) if type(value) is str else value


def _content_name(facts: RunFacts) -> str:
    name = content_name(facts.evaluation["scorer"]["note"]) if facts.evaluation else "CLIP score"
    return _capital(name)


def _capital(name: str) -> str:
    return f"{name[0].upper()}{name[1:]}"


def _galleries(facts: RunFacts) -> list[dict[str, Any]]:
    found = []
    if facts.subjects:
        kept = _evenly_spaced(list(facts.subjects[0].pictures), MOST_STEPS)
        found.append(_gallery("steps", "While it was tuned", facts.subjects, kept))
    if facts.scored:
        found.append(
            _gallery(
                "scored",
                "The pictures that were scored",
                facts.scored,
                list(facts.scored[0].pictures),
            )
        )
    return found


def _gallery(
    name: str, title: str, subjects: Sequence[Subject], labels: Sequence[str]
) -> dict[str, Any]:
    return {
        "name": name,
        "title": title,
        "labels": labels,
        "subjects": [
            {
                "prompt": one.prompt,
                "notes": one.notes,
                "sources": [data_url(one.pictures[label]) for label in labels],
            }
            for one in subjects
        ],
    }


def _evenly_spaced(labels: Sequence[str], most: int) -> list[str]:
    if len(labels) <= most:
        return list(labels)
    return [labels[round(index * (len(labels) - 1) / (most - 1))] for index in range(most)]


def data_url(picture: Image.Image) -> str:
    """Return a picture as a data URL; a large one is shrunk to the size that the page shows."""
    if max(picture.size) > LARGEST_SIDE:
        picture = picture.copy()
        picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
    kind, options = ("PNG", {}) if max(picture.size) <= LOSSLESS_SIDE else ("WEBP", {"quality": 85})
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, format=kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _charts(facts: RunFacts) -> list[dict[str, Any]]:
    steps = [line for line in facts.metrics if _is_finite(line.get("loss"))]
    train = (
        charts.binned([line["step"] for line in steps], [line["loss"] for line in steps])
        if steps
        else []
    )
    held_out = [
        charts.Point(line["step"], line["validation_loss"])
        for line in facts.metrics
        if _is_finite(line.get("validation_loss"))
    ]
    loss = [
        charts.Series("training batches", train),
        charts.Series("held-out examples", held_out, marks=True),
    ]
    rows = (facts.evaluation or {}).get("steps", [])
    similar = [
        charts.Series("similarity to the style", charts.of_steps(rows, "similarity"), marks=True)
    ]
    name = _content_name(facts)
    content = [charts.Series(name, charts.of_steps(rows, "clip_score"), marks=True)]
    found = [
        *(score_charts(facts.rewards) if facts.rewards else []),
        charts.chart("Loss", loss, _loss_name(facts)),
        facts.task_score.chart() if facts.task_score else None,
        charts.chart("Style: similarity to its images", similar, "cosine"),
        charts.chart(f"Content: {name}", content, "cosine"),
    ]
    return [one for one in found if one is not None]


def _loss_name(facts: RunFacts) -> str:
    if "task" in facts.settings:
        return "mean loss"
    return "minus the reward, in training" if facts.rewards else "mean squared error"


def _verdict(facts: RunFacts) -> list[dict[str, str]]:
    if facts.task_score is not None:
        return of_task(facts.task_score)
    if facts.evaluation is not None:
        return verdict(facts.evaluation)
    return _divergence(facts.metrics) or (findings(facts.rewards) if facts.rewards else [])


def _divergence(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return a finding if the newest loss of a run is not finite, else nothing."""
    for key, name in (("validation_loss", "held-out loss"), ("loss", "training loss")):
        lines = [line for line in metrics if key in line]
        if lines and not _is_finite(lines[-1][key]):
            text = f"The run diverged: its {name} is no finite number at step {lines[-1]['step']}."
            return [{"sign": "bad", "text": text}]
    return []


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _figures(facts: RunFacts) -> list[dict[str, Any]]:
    """Return the rows of the table of figures: name, base, tuned, difference, its interval, and a
    remark.
    """
    score, evaluation = facts.task_score, facts.evaluation
    if score is not None:
        ends = score.ends()
        if ends is None:
            return []
        states = {"base": ends[0], "begun": None, "tuned": ends[1]}
        return [_row(score.name, states, score.difference(*ends), score.remark)]
    return [] if evaluation is None else figure_rows(evaluation)


def figure_rows(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of evaluation.json: name, base, begun, tuned, delta, ci95, sure, remark."""
    style, clip, loss = evaluation["style"], evaluation["clip_score"], evaluation["validation_loss"]
    similarity, spread = style["similarity"], style["diversity"]
    content = f"{_capital(content_name(evaluation['scorer']['note']))} of the content"
    kept = "cosine, prompts without words of style"
    rows = [
        _row("Similarity to the style", _means(similarity), similarity, "cosine, higher is closer"),
        _row(content, _means(clip), clip, kept),
        *_rows_by_trigger(evaluation.get("trigger"), content),
        _row("KID to the style", _states(style["kid"]), style["kid"], "lower is closer"),
        _row("CMMD to the style", _states(style["cmmd"]), style["cmmd"], "lower is closer"),
        *_rows_of_loss(loss),
    ]
    before = spread.get("begun", spread["base"])
    unknown = spread["tuned"] is None or before is None
    difference = {"delta": None if unknown else spread["tuned"] - before}
    remark = f"the style's images: {figure(spread['style'])}"
    return [*rows, _row("Diversity", _states(spread, "tuned"), difference, remark)]


def _rows_by_trigger(found: Mapping[str, Any] | None, content: str) -> list[dict[str, Any]]:
    """Return similarity and content of the prompts with the captions' trigger, and of those
    without.
    """
    rows = []
    for name in ("with", "without"):
        part = (found or {}).get(name, {})
        for key, label in (("style", "Similarity to the style"), ("clip", content)):
            if key in part:
                remark = f"{part['n']} prompts {name} the trigger"
                rows.append(_row(f"… {label}", _means(part[key]), part[key], remark))
    return rows


def _rows_of_loss(loss: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    if not loss:
        return []
    remark = f"{loss['images']} images, lower is better"
    if not _is_finite(loss["tuned"]):
        remark = f"diverged: no finite number; {remark}"
    bands = [
        _row(f"Held-out loss at sigma {band['sigma']:g}", _states(band, "tuned"), band, "")
        for band in loss["bands"]
    ]
    return [_row("Held-out loss", _states(loss, "tuned"), loss, remark), *bands]


def _means(found: Mapping[str, Any]) -> dict[str, Any]:
    return {"base": found["base_mean"], "begun": found.get("begun_mean"), "tuned": found["mean"]}


def _states(found: Mapping[str, Any], tuned: str = "value") -> dict[str, Any]:
    return {"base": found["base"], "begun": found.get("begun"), "tuned": found[tuned]}


def _row(
    name: str, states: Mapping[str, Any], difference: Mapping[str, Any], remark: str
) -> dict[str, Any]:
    delta, interval = difference["delta"], difference.get("delta_ci95")
    sure = _is_interval(interval) and not interval[0] <= 0 <= interval[1]
    row = {"name": name, "delta": delta, "ci95": interval, "sure": sure, "remark": remark}
    return {**row, **states}


def _is_interval(value: Any) -> TypeGuard[Sequence[float]]:
    return value is not None and all(map(_is_finite, value))


def figure(value: Any, sign: bool = False) -> str:
    """Format a number for a person, with a dash for none and for one that is not finite."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool | str) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    small = value != 0 and abs(value) < 0.001
    return f"{value:{'+' if sign else ''}{'.2e' if small else '.4f'}}"


def interval(value: Sequence[float] | None) -> str:
    if value is None or not _is_interval(value):
        return "–"
    return f"{figure(value[0], True)} to {figure(value[1], True)}"


def percent(value: float | None) -> str:
    return f"{value:.0%}" if value is not None and math.isfinite(value) else "–"


def cell(value: Any) -> str:
    """Format a value of dataset.json: hashes are shortened, lists joined."""
    if isinstance(value, list):
        return "; ".join(map(str, value))
    text = "–" if value is None else str(value)
    return f"{text[:12]}…" if len(text) == 64 and text.isalnum() else text


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in settings.items():
        rows += (
            _flat(value, f"{prefix}{key}.")
            if isinstance(value, Mapping)
            else [(prefix + key, str(value))]
        )
    return rows
