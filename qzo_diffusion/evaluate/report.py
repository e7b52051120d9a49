"""One self-contained page on a run: what changed, how sure that is, and everything that is needed
to do it again.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from qzo_diffusion.evaluate import charts
from qzo_diffusion.evaluate.task_score import TaskScore
from qzo_diffusion.evaluate.verdict import of_task

TEMPLATE = "report.html.jinja"
# of an embedded picture, in pixels: a page is looked at and sent, the run's own files stay whole
LARGEST_SIDE = 384
MOST_STEPS = 12  # whose pictures are embedded, the first and the last among them
LOSSLESS_SIDE = 128


@dataclass(frozen=True)
class Subject:
    """Pictures of one prompt by label ("step 400", "base"), all of the same seed; `notes` are shown
    below.
    """

    prompt: str
    pictures: Mapping[str, Image.Image]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class RunFacts:
    """What a run's folder holds, read by whoever knows its files.

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
    task_score: TaskScore | None = None  # of a language model
    written: str = ""


def render(facts: RunFacts) -> str:
    """The page. It asks for nothing from a network, and its own policy forbids it to.

    Raises:
        ValueError: figures of another shape than `evaluate` gives them.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "figure": figure,
        "interval": interval,
        "percent": percent,
        "cell": cell,
    }
    try:
        return environment.get_template(TEMPLATE).render(
            run=facts,
            galleries=_galleries(facts),
            charts=_charts(facts),
            figures=_figures(facts),
            verdict=_verdict(facts),
            settings=_flat(facts.settings),
            environment=_flat(facts.environment),
        )
    except (UndefinedError, KeyError, TypeError) as error:
        raise ValueError(f"no such figure: {error}") from error


def _galleries(facts: RunFacts) -> list[dict[str, Any]]:
    found = []
    if facts.subjects:
        kept = _rms(list(facts.subjects[0].pictures), MOST_STEPS)
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


def _rms(labels: Sequence[str], most: int) -> list[str]:
    if len(labels) <= most:
        return list(labels)
    return [labels[round(index * (len(labels) - 1) / (most - 1))] for index in range(most)]


def data_url(picture: Image.Image) -> str:
    """A small picture as it is, a large one no larger than the page shows it."""
    if max(picture.size) > LARGEST_SIDE:
        picture = picture.copy()
        picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
    kind, options = ("PNG", {}) if max(picture.size) <= LOSSLESS_SIDE else ("WEBP", {"quality": 85})
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, format=kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _charts(facts: RunFacts) -> list[dict[str, Any]]:
    steps = [line for line in facts.metrics if isinstance(line.get("loss"), float)]
    train = (
        charts.binned([line["step"] for line in steps], [line["loss"] for line in steps])
        if steps
        else []
    )
    held_out = [
        charts.Point(line["step"], line["validation_loss"])
        for line in facts.metrics
        if "validation_loss" in line
    ]
    loss = [
        charts.Series("training batches", train),
        charts.Series("held-out examples", held_out, marks=True),
    ]
    rows = (facts.evaluation or {}).get("steps", [])
    similar = [
        charts.Series("similarity to the style", charts.of_steps(rows, "similarity"), marks=True)
    ]
    content = [charts.Series("CLIP score", charts.of_steps(rows, "clip_score"), marks=True)]
    found = [
        charts.chart(
            "Loss", loss, "mean loss" if "task" in facts.settings else "mean squared error"
        ),
        facts.task_score.chart() if facts.task_score else None,
        charts.chart("Style: similarity to its images", similar, "cosine"),
        charts.chart("Content: CLIP score", content, "cosine"),
    ]
    return [one for one in found if one is not None]


def _verdict(facts: RunFacts) -> list[dict[str, str]]:
    if facts.task_score is not None:
        return of_task(facts.task_score)
    return facts.evaluation["verdict"] if facts.evaluation else []


def _figures(facts: RunFacts) -> list[dict[str, Any]]:
    """Rows of the table of figures: name, base, tuned, difference, its interval, and what a reader
    must know.
    """
    score, evaluation = facts.task_score, facts.evaluation
    if score is not None:
        ends = score.ends()
        return [_row(score.name, *ends, score.difference(*ends), score.remark)] if ends else []
    if evaluation is None:
        return []
    style, clip, loss = evaluation["style"], evaluation["clip_score"], evaluation["validation_loss"]
    similarity, kid, cmmd = style["similarity"], style["kid"], style["cmmd"]
    rows = [
        _row(
            "Similarity to the style",
            similarity["base_mean"],
            similarity["mean"],
            similarity,
            "cosine, higher is closer",
        ),
        _row(
            "CLIP score of the content",
            clip["base_mean"],
            clip["mean"],
            clip,
            "cosine, prompts without words of style",
        ),
        _row("KID to the style", kid["base"], kid["value"], kid, "lower is closer"),
        _row(
            "CMMD to the style",
            cmmd["base"],
            cmmd["value"],
            {"delta": cmmd["delta"], "delta_ci95": None},
            "lower is closer",
        ),
    ]
    if loss:
        rows.append(
            _row(
                "Held-out loss",
                loss["base"],
                loss["tuned"],
                loss,
                f"{loss['images']} images, lower is better",
            )
        )
        rows += [
            _row(f"Held-out loss at sigma {b['sigma']:g}", b["base"], b["tuned"], b, "")
            for b in loss["bands"]
        ]
    spread = style["diversity"]
    difference = None if spread["tuned"] is None else spread["tuned"] - spread["base"]
    remark = f"the style's images: {figure(spread['style'])}"
    rows.append(
        _row(
            "Diversity",
            spread["base"],
            spread["tuned"],
            {"delta": difference, "delta_ci95": None},
            remark,
        )
    )
    return rows


def _row(
    name: str, base: Any, tuned: Any, difference: Mapping[str, Any], remark: str
) -> dict[str, Any]:
    delta, interval = difference["delta"], difference["delta_ci95"]
    sure = interval is not None and not interval[0] <= 0 <= interval[1]
    return {
        "name": name,
        "base": base,
        "tuned": tuned,
        "delta": delta,
        "ci95": interval,
        "sure": sure,
        "remark": remark,
    }


def figure(value: Any, sign: bool = False) -> str:
    """A number for a person; a dash where there is none."""
    if value is None:
        return "–"
    if isinstance(value, bool | str) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    small = value != 0 and abs(value) < 0.001
    return f"{value:{'+' if sign else ''}{'.2e' if small else '.4f'}}"


def interval(value: Sequence[float] | None) -> str:
    return "–" if value is None else f"{figure(value[0], True)} to {figure(value[1], True)}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def cell(value: Any) -> str:
    """A value of dataset.json: hashes are shortened, lists joined."""
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
