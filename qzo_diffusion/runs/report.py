"""Read a run's folder and write one page on it, for `qzo-diffuse report` and during the run."""

import contextlib
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from qzo_diffusion.config.files import read_yaml
from qzo_diffusion.config.reward import VOTES
from qzo_diffusion.core.errors import JournalError, OutputError
from qzo_diffusion.core.journal import read_journal
from qzo_diffusion.diffusion.images import BadImage, open_image
from qzo_diffusion.diffusion.sampling import cells, load_picture
from qzo_diffusion.evaluate.report import RunFacts, Subject, render
from qzo_diffusion.evaluate.scorer import content_name
from qzo_diffusion.evaluate.task_score import TaskScore
from qzo_diffusion.runs import usage
from qzo_diffusion.runs.ending import Ending, next_commands
from qzo_diffusion.runs.locate import locate
from qzo_diffusion.runs.publish import published, published_text
from qzo_diffusion.system import escape
from qzo_diffusion.system.files import COMPLETE, finite, write_whole
from qzo_diffusion.system.reading import parse_json, read_json, read_json_lines

PAGE = "report.html"
MOST_IMAGES = 12  # images of the style beside the pictures


def run(folder: Path, output: Path | None = None) -> dict[str, Any]:
    """Write the page and return the figures for `--json`.

    Raises:
        OutputError: there is no run, or the page can't be written.
    """
    target = write(locate(folder).run(), output)
    return {"report": str(target), "bytes": target.stat().st_size}


def write(folder: Path, output: Path | None = None) -> Path:
    """Write the page on a run as its folder is now, as a whole or not at all."""
    target = output or scores_folder(folder) / PAGE
    try:
        page = render(_facts(folder))
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        remedy = (
            f"measure it again (qzo-diffuse evaluate --run {folder}; a language model by "
            "--resume), or remove evaluation.json"
        )
        raise OutputError(
            f"a file in {folder} can't be shown: {error}",
            "files as this version writes them",
            remedy,
        ) from error
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, page.encode())
    return target


def scores_folder(folder: Path) -> Path:
    """Return the folder of figures and page: the run's own, or one beside an export, whose files
    are hashed.
    """
    if not (folder / COMPLETE).is_file():
        return folder
    own = folder.absolute()
    return own.with_name(f"{own.name}-evaluation")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read the whole lines of metrics.jsonl; a running process may be writing the last one."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    try:
        found = [parse_json(line) for line in read_json_lines(path)]
        if not all(isinstance(line, dict) for line in found):
            raise ValueError("a line that holds no object")
    except (OSError, ValueError) as error:
        raise OutputError(
            f"{path} is damaged: {error}", "a line for each step", "restore it, or delete it"
        ) from None
    return found


def grid_prompts(folder: Path) -> list[str]:
    """Return the prompts of the rows of samples/, empty for a folder without."""
    table = _read_json(folder / "samples" / "prompts.json", [])
    return [row["prompt"] for row in table]


def step_grids(folder: Path) -> list[tuple[int, Path]]:
    """Return the grids of samples/ by step, in the order of steps."""
    files = (folder / "samples").glob("step_*.png")
    numbered = ((file.stem.removeprefix("step_"), file) for file in files)
    return sorted((int(step), file) for step, file in numbered if step.isdecimal())


def _facts(folder: Path) -> RunFacts:
    settings, metrics = read_yaml(folder / "config.yaml"), read_metrics(folder)
    evaluation = finite(_read_json(scores_folder(folder) / "evaluation.json", None))
    task_score = TaskScore.read(evaluation) if evaluation and "by_step" in evaluation else None
    evaluation = None if task_score else evaluation
    journal = _journal(folder)
    dataset = _read_json(folder / "dataset.json", [])
    environment = _read_json(folder / "environment.json", {})
    finished = (folder / "final").is_dir() or (folder / COMPLETE).is_file()
    return RunFacts(
        name=published_text(folder.resolve().name),
        step=journal.get("steps", 0),
        max_steps=settings["train"]["max_steps"],
        finished=finished,
        final_step=next(
            (line["final_step"] for line in metrics[-1:] if "final_step" in line), None
        ),
        subjects=_subjects(folder),
        scored=_scored(folder, evaluation),
        metrics=metrics,
        settings=published(settings),
        dataset=[published(row) for row in dataset],
        environment=published(environment),
        journal=journal,
        evaluation=evaluation,
        task_score=task_score,
        rewards=_rewards(folder),
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        style=_style(settings, dataset),
        costs=_costs(folder, environment, metrics),
        next=_next(folder.resolve().name, settings, finished, evaluation is not None),
        prompts_note=_prompts_note(folder),
    )


def _rewards(folder: Path) -> dict[str, Any] | None:
    """Return rewards.json of a run on rewards, without local paths in the names of rewards."""
    found = _read_json(folder / "rewards.json", None)
    if found is None:
        return None
    names = {"rewards": {published_text(name): one for name, one in found["rewards"].items()}}
    second = found["second"] and published_text(found["second"])
    return {**names, "second": second, "steps": finite(found["steps"])}


def _style(settings: Mapping[str, Any], dataset: Sequence[Mapping[str, Any]]) -> list[Subject]:
    """Return the first training images that still exist."""
    place = str((settings.get("data") or {}).get("style_dir") or "")
    shown: list[Subject] = []
    for row in dataset if place else []:
        if row.get("split", "train") != "train" or len(shown) == MOST_IMAGES:
            continue
        with contextlib.suppress(BadImage, OSError, ValueError):
            image = open_image(Path(place) / row["file"]).image
            shown.append(Subject(str(row.get("caption") or ""), {"": image}))
    return shown


def _costs(
    folder: Path, environment: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """Return the device, the minutes of all steps and the peak memory, as far as the run recorded
    them.
    """
    found = {}
    if device := environment.get("device"):
        name = environment.get("device_name")
        found["device"] = f"{device} ({name})" if name else str(device)
    seconds = [line["seconds"] for line in metrics if isinstance(line.get("seconds"), int | float)]
    if seconds:
        found["minutes"] = f"{sum(seconds) / 60:.1f}"
    if used := usage.read(folder):
        found["peak memory"] = f"{used['peak_memory_bytes'] / 1e9:.2f} GB"
    return found


def _next(
    name: str, settings: Mapping[str, Any], finished: bool, evaluated: bool
) -> list[tuple[str, str]]:
    """Return purpose and command, as typed in the folder that holds the run."""
    kind: Ending = "llm" if "task" in settings else "style"
    if (settings.get("reward") or {}).get("scores") == [VOTES]:
        kind = "votes"
    shown = name if published_text(name) == name else "RUN"
    found = next_commands(escape.one_line(shown), kind, stopped=not finished)
    if evaluated and finished:
        del found["score it"]
    return list(found.items())


def _prompts_note(folder: Path) -> str:
    """Name the grid's prompts that hold the captions' trigger."""
    rows = _read_json(folder / "samples" / "prompts.json", [])
    words = [row["trigger"] for row in rows if row.get("trigger")]
    if not words:
        return ""
    count = sum(bool(row.get("with")) for row in rows)
    note = f"{count or 'None'} of the {len(rows)} prompts hold{'s' * (count <= 1)} the trigger "
    note += f"{words[0]!r}, as the captions do"
    if count == len(rows):
        return f"{note}."
    return f"{note}; the others show what comes without it."


def _subjects(folder: Path) -> list[Subject]:
    prompts, columns = grid_prompts(folder), step_grids(folder)
    pictures: list[dict[str, Any]] = [{} for _ in prompts]
    for step, path in columns if prompts else []:
        for of_prompt, picture in zip(
            pictures, cells(load_picture(path), len(prompts)), strict=True
        ):
            of_prompt[f"step {step:,}"] = picture
    return [
        Subject(prompt, shown) for prompt, shown in zip(prompts, pictures, strict=True) if shown
    ]


def _scored(folder: Path, evaluation: dict[str, Any] | None) -> list[Subject]:
    kept, subjects = scores_folder(folder) / "evaluation", []
    for index, row in enumerate(evaluation["prompts"] if evaluation else []):
        states = ("base", "begun", "tuned") if len(row["clip"]) == 3 else ("base", "tuned")
        files = {state: kept / state / f"{index:03d}.png" for state in states}
        if not all(file.is_file() for file in files.values()):
            return []
        name = content_name(evaluation["scorer"]["note"]) if evaluation else ""
        notes = [
            f"{label} {' → '.join(_short(value) for value in row[key])}"
            for label, key in ((name, "clip"), ("style", "style"))
        ]
        if "trigger" in row and evaluation and evaluation.get("trigger"):
            notes.append("with the trigger" if row["trigger"] else "without the trigger")
        pictures = {state: load_picture(file) for state, file in files.items()}
        subjects.append(Subject(row["content"], pictures, notes))
    return subjects


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _journal(folder: Path) -> dict[str, Any]:
    path = folder / "journal.qzo"
    if not path.is_file():
        return {}
    try:
        journal = read_journal(path)
    except JournalError as error:
        return {"steps": 0, "bytes": path.stat().st_size, "chain": f"damaged: {error.got}"}
    return {"steps": journal.steps_done, "bytes": journal.size, "chain": journal.chain}


def _read_json(path: Path, missing: Any) -> Any:
    if not path.is_file():
        return missing
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise OutputError(
            f"{path} is damaged: {error}", "the file as it was written", "write it again"
        ) from None
