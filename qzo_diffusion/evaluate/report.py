"""Write one self-contained page on a run: the changes, their intervals, and everything that is
needed to repeat the run.
"""

import base64
import functools
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from qzo_diffusion.evaluate import charts
from qzo_diffusion.evaluate.report_figures import (
    capital,
    cell,
    figure,
    figure_rows,
    interval,
    is_finite,
    percent,
    row,
)
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
    return capital(name)


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
    steps = [line for line in facts.metrics if is_finite(line.get("loss"))]
    train = (
        charts.binned([line["step"] for line in steps], [line["loss"] for line in steps])
        if steps
        else []
    )
    held_out = [
        charts.Point(line["step"], line["validation_loss"])
        for line in facts.metrics
        if is_finite(line.get("validation_loss"))
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
        if lines and not is_finite(lines[-1][key]):
            text = f"The run diverged: its {name} is no finite number at step {lines[-1]['step']}."
            return [{"sign": "bad", "text": text}]
    return []


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
        return [row(score.name, states, score.difference(*ends), score.remark)]
    return [] if evaluation is None else figure_rows(evaluation)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in settings.items():
        rows += (
            _flat(value, f"{prefix}{key}.")
            if isinstance(value, Mapping)
            else [(prefix + key, str(value))]
        )
    return rows
