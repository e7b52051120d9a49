"""Write the README of an exported language model: its origin, its scores and its settings."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from qzo_diffusion import __version__
from qzo_diffusion.config.llm import LlmConfig
from qzo_diffusion.evaluate.task_score import TaskScore
from qzo_diffusion.runs.locate import locate
from qzo_diffusion.runs.publish import base_id, published, published_model
from qzo_diffusion.system.escape import markdown, markdown_code
from qzo_diffusion.system.reading import read_json

OF_THE_BASE = "README.base.md"  # the base model's own README


def write(target: Path, run: Path, config: LlmConfig, facts: Mapping[str, str]) -> None:
    """Write README.md in `target`. A copy of the base's README keeps another name there."""
    if (target / "README.md").exists():
        (target / "README.md").rename(target / OF_THE_BASE)
    (target / "README.md").write_text(card(run, config, facts), encoding="utf-8")


def card(run: Path, config: LlmConfig, facts: Mapping[str, str]) -> str:
    """Return YAML for hubs, then text. Names from outside are escaped.

    Args:
        run: the run's folder as the user gave it.
        facts: metadata of the tuned scales.
    """
    hub_id = base_id(config.model)
    head: dict[str, Any] = {} if hub_id is None else {"base_model": hub_id}
    head |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    head |= {"tags": ["qzo", "zeroth-order"]}
    folder = locate(run).run()
    task = str(published(config.task, "task"))
    settings = {
        "task": task,
        "steps": facts.get("qzo.steps", str(config.train.max_steps)),
        "examples a step": config.data.batch_size,
        "trained numbers": config.qzo.parametrization,
        "rate": f"{config.train.lr}, {config.train.schedule}",
        "eps": config.qzo.eps,
        "method": config.method,
        "made with": f"qzo_diffusion {__version__}",
    }
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# {markdown(folder.resolve().name)}",
        f"{markdown_code(published_model(config.model))}, tuned on the task {markdown(task)}: its "
        "codes are those of the base, its quantization scales are tuned "
        "(QZO, arXiv 2505.13430).",
        "## Scores",
        _scores(folder, int(facts.get("qzo.steps", 0))),
        "## Settings",
        _table(("Setting", "Value"), settings),
        "## Licence",
        f"The licence of the base model applies; its own README is {OF_THE_BASE} where it has one.",
    ]
    return "\n\n".join(parts) + "\n"


def _scores(folder: Path, step: int) -> str:
    """Return the metric at the run's start and at this step, as far as the run measured it."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        score = TaskScore.read(read_json(folder / "evaluation.json"))
        first = min(score.by_step)
        if step in score.by_step:
            rows = {f"step {at}": f"{score.by_step[at]:.4f}" for at in sorted({first, step})}
            return _table((score.name, score.remark), rows)
    return "None was measured."


def _table(head: tuple[str, str], rows: Mapping[str, Any]) -> str:
    lines = [head, ("---", "---"), *rows.items()]
    cells = (
        (line if line[0] == "---" else (markdown(line[0]), markdown(str(line[1]))))
        for line in lines
    )
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
