"""Train and score a run of the command line in this process, or go on with it."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qzo_diffusion import resources
from qzo_diffusion.cli import main as command_line
from qzo_diffusion.diffusion.prompts import read_prompt_file

PROMPTS = 120  # to train on


def training_prompts(work: Path) -> Path:
    """Write prompts that the embedded model was taught and that no score or grid has."""
    shown = {
        text
        for name in ("tiny_grid", "tiny_score")
        for text in read_prompt_file(resources.shipped("prompts") / f"{name}.txt").texts
    }
    concepts = json.loads((resources.tiny_model() / "concepts.json").read_text())["concepts"]
    chosen = [concept for concept in concepts if concept not in shown][:PROMPTS]
    work.mkdir(parents=True, exist_ok=True)
    path = work / "train.txt"
    path.write_text("\n".join(chosen) + "\n")
    return path


def trained(options: argparse.Namespace, name: str, rewards: Sequence[str]) -> Path:
    """Train a run on rewards, or go on with it; return its folder.

    Raises:
        SystemExit: the command line failed; it has said why.
    """
    run = options.work / name
    if not (run / "final").is_dir():
        more = ["--resume", str(run)] if (run / "config.yaml").is_file() else _new(options, run)
        chosen = [part for reward in rewards for part in ("--reward", reward)]
        code = command_line(["train", *more, *(chosen if more[0] != "--resume" else [])])
        if code:
            raise SystemExit(code)
    return run


def _new(options: argparse.Namespace, run: Path) -> list[str]:
    prompts = training_prompts(options.work)
    given = ["--model", options.model, "--prompts", str(prompts), "--output-dir", str(run)]
    return [*given, "--max-steps", str(options.steps), *options.settings]


def evaluated(run: Path) -> dict[str, Any]:
    """Score the base and the tuned scales on the shipped score prompts, once."""
    path = run / "reward_evaluation.json"
    if not path.is_file() and (code := command_line(["evaluate", "--run", str(run)])):
        raise SystemExit(code)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def seconds_of(run: Path) -> float:
    """Return the seconds of all training steps."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return round(sum(line.get("seconds", 0.0) for line in lines), 1)
