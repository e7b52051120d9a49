"""What `qzo-diffuse report` does, and a run itself while it goes on: read the run's folder and
write one page on it.
"""

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from qzo_diffusion.config.files import read_yaml
from qzo_diffusion.core.errors import JournalError, OutputError
from qzo_diffusion.core.journal import read_journal
from qzo_diffusion.diffusion.sampling import cells, load_picture
from qzo_diffusion.evaluate.report import RunFacts, Subject, render
from qzo_diffusion.evaluate.task_score import TaskScore
from qzo_diffusion.files import write_whole
from qzo_diffusion.runs.locate import locate

PAGE = "report.html"


def run(folder: Path, output: Path | None = None) -> dict[str, Any]:
    """Raises OutputError when there is no run, or the page can't be written."""
    target = write(locate(folder).run(), output)
    return {"report": str(target), "bytes": target.stat().st_size}


def write(folder: Path, output: Path | None = None) -> Path:
    """The page on a run as its folder is now, whole or not at all."""
    target = output or folder / PAGE
    try:
        page = render(_facts(folder))
    except (KeyError, TypeError, ValueError) as error:
        remedy = (
            f"measure it again (qzo-diffuse evaluate --run {folder}; a language model by "
            "--resume), or remove evaluation.json"
        )
        raise OutputError(
            f"a file in {folder} can't be shown: {error}",
            "files as this version writes them",
            remedy,
        ) from error
    write_whole(target, page.encode())
    return target


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl; a run that goes on may just be writing the last."""
    path = folder / "metrics.jsonl"
    lines = (
        path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        if path.is_file()
        else []
    )
    return [json.loads(line) for line in lines if line.endswith("\n")]


def grid_prompts(folder: Path) -> list[str]:
    """The prompts of the rows of samples/, empty for a folder without."""
    table = _read_json(folder / "samples" / "prompts.json", [])
    return [row["prompt"] for row in table]


def _facts(folder: Path) -> RunFacts:
    settings, metrics = read_yaml(folder / "config.yaml"), read_metrics(folder)
    evaluation = _read_json(folder / "evaluation.json", None)
    task_score = TaskScore.read(evaluation) if evaluation and "by_step" in evaluation else None
    evaluation = None if task_score else evaluation
    journal = _journal(folder)
    return RunFacts(
        name=folder.resolve().name,
        step=journal.get("steps", 0),
        max_steps=settings["train"]["max_steps"],
        finished=(folder / "final").is_dir(),
        subjects=_subjects(folder),
        scored=_scored(folder, evaluation),
        metrics=metrics,
        settings=settings,
        dataset=_read_json(folder / "dataset.json", []),
        environment=_read_json(folder / "environment.json", {}),
        journal=journal,
        evaluation=evaluation,
        task_score=task_score,
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _subjects(folder: Path) -> list[Subject]:
    prompts, columns = grid_prompts(folder), sorted((folder / "samples").glob("step_*.png"))
    pictures: list[dict[str, Any]] = [{} for _ in prompts]
    for path in columns if prompts else []:
        label = f"step {int(path.stem.removeprefix('step_')):,}"
        for of_prompt, picture in zip(
            pictures, cells(load_picture(path), len(prompts)), strict=True
        ):
            of_prompt[label] = picture
    return [
        Subject(prompt, shown) for prompt, shown in zip(prompts, pictures, strict=True) if shown
    ]


def _scored(folder: Path, evaluation: dict[str, Any] | None) -> list[Subject]:
    subjects = []
    for index, row in enumerate(evaluation["prompts"] if evaluation else []):
        files = {
            state: folder / "evaluation" / state / f"{index:03d}.png" for state in ("base", "tuned")
        }
        if not all(file.is_file() for file in files.values()):
            return []
        notes = [
            f"{name} {row[key][0]:.2f} → {row[key][1]:.2f}"
            for name, key in (("CLIP score", "clip"), ("style", "style"))
        ]
        subjects.append(
            Subject(
                row["content"], {state: load_picture(file) for state, file in files.items()}, notes
            )
        )
    return subjects


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
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OutputError(
            f"{path} is damaged: {error}", "the file as it was written", "write it again"
        ) from None
