"""Kill runs on rewards at random moments and resume them, as `benchmarks.kill_resume` does."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.kill_resume import STEPS, Bench, figures_of

TRIALS = 10
SETTINGS = [
    *("--model", "tiny", "--max-steps", str(STEPS), "--reward", "compressibility"),
    *("reward.steps=1", "data.batch_size=2", "qzo.num_directions=2", "sample.steps=1"),
    *("sample.every=5", "train.checkpoint_every=2", "train.keep_checkpoints=2"),
    "train.optimizer=momentum",
]


def arguments(out: Path, work: Path) -> list[str]:
    """The command line of a run; the prompts to train on lie among the files of `few_files`."""
    prompts = work / "train.txt"
    prompts.write_text("guitar\nhouse\nrocket\npanda\n")
    places = ["--prompts", str(prompts), "--sample-prompts", str(work / "prompts.txt")]
    cache = f"data.cache_dir={work / 'cache'}"
    return ["train", *places, "--output-dir", str(out), cache, *SETTINGS]


def kills(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(Path(work), arguments)
        trials = [bench.trial(index, seed=0) for index in range(TRIALS)]
    return figures_of(trials, seed=0)
