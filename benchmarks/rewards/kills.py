"""Kill runs on rewards, and on votes while a simulated voter chooses, at random moments and resume
them, as `benchmarks.kill_resume` does.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.kill_resume import STEPS, Bench, figures_of
from benchmarks.rewards.voter import SimulatedVoter, let_vote
from qzo_diffusion.rewards import of_pixels

TRIALS, OF_VOTES = 10, 3  # all, and the last ones of them
SETTINGS = [
    *("--model", "tiny", "reward.steps=1", "data.batch_size=2", "sample.steps=1"),
    *("sample.every=5", "train.checkpoint_every=2", "train.keep_checkpoints=2"),
    "train.optimizer=momentum",
]
OF_REWARDS = ["--max-steps", str(STEPS), "--reward", "compressibility", "qzo.num_directions=2"]


def arguments(out: Path, work: Path) -> list[str]:
    """The command line of a run on a reward."""
    return ["train", "--output-dir", str(out), *_places(work), *SETTINGS, *OF_REWARDS]


def vote_arguments(out: Path, work: Path) -> list[str]:
    """The command line of a run on votes of as many steps."""
    pairs = ["--pairs", str(2 * STEPS), "reward.second=none"]
    return ["vote", "--run", str(out), *_places(work), *SETTINGS, *pairs]


def _places(work: Path) -> list[str]:
    """The prompts to train on lie among the files of `few_files`."""
    prompts = work / "train.txt"
    prompts.write_text("guitar\nhouse\nrocket\npanda\n")
    sampled, cache = str(work / "prompts.txt"), f"data.cache_dir={work / 'cache'}"
    return ["--prompts", str(prompts), "--sample-prompts", sampled, cache]


def simulated_vote(command: list[str]) -> int:
    let_vote(command, lambda config: SimulatedVoter(of_pixels.compressibility))
    return 0


def kills(options: argparse.Namespace) -> dict[str, Any]:
    split = TRIALS - OF_VOTES
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(Path(work), arguments)
        trials = [bench.trial(index, seed=0) for index in range(split)]
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(Path(work), vote_arguments, simulated_vote, ("vote", "--run"))
        trials += [bench.trial(index, seed=0) for index in range(split, TRIALS)]
    return figures_of(trials, seed=0) | {"of_votes": OF_VOTES}
