"""Kill runs at random moments and resume them: `OMP_NUM_THREADS=1 python -m benchmarks.kill_resume`.

Each trial forks a training run from this warm process (so imports are paid once), kills it with SIGKILL after a random time, forks
a second process that resumes it, and compares everything with a run that was never stopped: metrics but `seconds`, final scales,
sample pictures and the journal's steps. Checkpoints are written every second step, so that many kills fall into their writing.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.record import write_results
from qzo_diffusion import resources
from qzo_diffusion.cli import main as qzo_diffuse
from qzo_diffusion.core.journal import read_journal

STEPS = 12
SETTINGS = [
    *("--model", "tiny", "--max-steps", str(STEPS), "data.batch_size=2", "sample.steps=1", "sample.every=5"),
    *("train.checkpoint_every=2", "train.validate_every=4", "train.keep_checkpoints=2", "qzo.parametrization=dense"),
    "train.optimizer=momentum",
]


def forked(arguments: list[str], quiet: Path) -> int:
    """The process id of a child that runs the command line."""
    child = os.fork()
    if child:
        return child
    log = os.open(quiet, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os._exit(qzo_diffuse(arguments))


def train_arguments(out: Path, work: Path) -> list[str]:
    images = resources.PACKAGE / "demo_images" / "fluent_mono"
    folders = ["--style-dir", str(images / "train"), "--validation-dir", str(images / "held_out")]
    return ["train", *folders, "--output-dir", str(out), f"data.cache_dir={work / 'cache'}", *SETTINGS]


def differences(whole: Path, other: Path) -> list[str]:
    """What is not bit for bit the same."""
    found = []
    if without_seconds(whole) != without_seconds(other):
        found.append("metrics.jsonl")
    pictures = [Path("samples") / path.name for path in sorted((whole / "samples").iterdir())]
    for name in [Path("final/scales.safetensors"), *pictures]:
        if not (other / name).exists() or (whole / name).read_bytes() != (other / name).read_bytes():
            found.append(str(name))
    if read_journal(whole / "journal.qzo").steps != read_journal(other / "journal.qzo").steps:
        found.append("journal.qzo")
    return found


def without_seconds(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def steps_in(run: Path) -> int:
    path = run / "journal.qzo"
    try:
        return read_journal(path).steps_done
    except Exception:
        return 0


def one_trial(index: int, whole: Path, duration: float, work: Path, moment: random.Random) -> dict[str, Any]:
    run, log = work / f"trial_{index}", work / f"trial_{index}.log"
    child = forked(train_arguments(run, work), log)
    time.sleep(moment.uniform(0.0, duration))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    before = steps_in(run)
    started = (run / "journal.qzo").exists()
    if not started:  # killed before the run was there: nothing to lose, and nothing to resume
        shutil.rmtree(run, ignore_errors=True)
    arguments = ["train", "--resume", str(run)] if started else train_arguments(run, work)
    code = os.waitstatus_to_exitcode(os.waitpid(forked(arguments, log), 0)[1])
    lost = 0
    if started and code == 0:
        notes = [entry for entry in read_journal(run / "journal.qzo").entries if getattr(entry, "kind", "") == "resume"]
        lost = before - int(notes[-1].content["step"])  # type: ignore[union-attr]
    wrong = differences(whole, run) if code == 0 else [f"exit code {code}: {log.read_text()[-500:]}"]
    if not wrong:
        shutil.rmtree(run)
        log.unlink()
    return {"killed_after_steps": before, "started": started, "lost": lost, "wrong": wrong}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="qzo_kill_"))
    warm, whole = work / "warm", work / "whole"
    # The first run in this process loads every library and fills the cache of encoded images; the second one is the yardstick.
    for path in (warm, whole):
        began = time.perf_counter()
        if qzo_diffuse(train_arguments(path, work)):
            sys.exit("the uninterrupted run failed")
    duration = time.perf_counter() - began
    moment = random.Random(args.seed)
    trials = [one_trial(index, whole, duration, work, moment) for index in tqdm(range(args.trials), desc="kills")]
    bad = [trial for trial in trials if trial["wrong"]]
    figures = {
        "trials": len(trials),
        "identical": len(trials) - len(bad),
        "lost_steps": sum(trial["lost"] for trial in trials),
        "killed_after_steps": [trial["killed_after_steps"] for trial in trials],
        "killed_before_the_run_was_there": sum(not trial["started"] for trial in trials),
        "failures": bad,
    }
    print(write_results("kill_resume", figures))
    if not bad:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
