"""Kill runs at random moments and resume them: `OMP_NUM_THREADS=1 python -m
benchmarks.kill_resume`.

Each trial forks a training run from this warm process (so imports are paid once), kills it with
SIGKILL, forks a second one that resumes it (in every fifth trial that one is killed too, and a
third goes on), and compares everything with a run that was never stopped: metrics but `seconds`,
scales, checkpoints, sample pictures and the journal's steps. In two trials of five the moment is
any time of the run; in one it is the writing of a journal record, which is torn at a random byte;
in two it is a random one of the calls that write, sync, rename or remove files, mostly those of
checkpoints, and a file just written may be left half. A step counts as completed when the process
noted it in a file of its own, so that the journal is not its own witness.

`--minutes 3` stops after that time and keeps what was done; the same command goes on with the
missing trials."""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import RESULTS, write_results
from qzo_diffusion import resources
from qzo_diffusion.cli import main as qzo_diffuse
from qzo_diffusion.core.journal import read_journal
from qzo_diffusion.runs import trainer as running
from qzo_diffusion.train import run_folder
from qzo_diffusion.train.run_folder import load_tensors

STEPS = 12
SETTINGS = [
    *(
        "--model",
        "tiny",
        "--max-steps",
        str(STEPS),
        "data.batch_size=2",
        "sample.steps=1",
        "sample.every=5",
    ),
    *(
        "train.checkpoint_every=2",
        "train.validate_every=4",
        "train.keep_checkpoints=2",
        "qzo.parametrization=dense",
    ),
    "train.optimizer=momentum",
]
FILE_CALLS = {"fsync": os, "replace": os, "save_file": run_folder, "rmtree": shutil}
TOO_LONG_SECONDS = 120


def call_in_place(owner: Any, name: str, instead: Callable[..., Any]) -> None:
    """`owner.name` becomes `instead(original, *arguments)`."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *arguments, **options: instead(original, *arguments, **options))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def note_completed_steps(file: Path) -> None:
    """One byte for every step whose record the run has finished."""
    done = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def on_step(original: Callable[..., None], *arguments: Any) -> None:
        original(*arguments)
        os.write(done, b".")

    call_in_place(running.Trainer, "on_step", on_step)


def tear_a_record(chance: random.Random) -> None:
    """Die in the writing of a random record, with none, some or all of its bytes written."""
    calls, last = Counter[str](), chance.randint(1, STEPS)

    def pwrite(original: Callable[..., int], file: int, data: bytes, offset: int) -> int:
        calls["pwrite"] += 1
        if calls["pwrite"] == last:
            original(file, data[: chance.randint(0, len(data))], offset)
            die()
        return original(file, data, offset)

    call_in_place(os, "pwrite", pwrite)


def die_at_a_file(chance: random.Random, counts: Counter[str]) -> None:
    """Die just before or just after a random call that changes files; a file just saved may be left
    torn.
    """
    name = chance.choice(sorted(FILE_CALLS))
    last, late, calls = chance.randint(1, counts[name]), chance.random() < 0.5, Counter[str]()

    def accident(original: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        calls[name] += 1
        if calls[name] < last:
            return original(*arguments, **options)
        if late:
            original(*arguments, **options)
            if name == "save_file":
                os.truncate(arguments[1], chance.randint(0, os.path.getsize(arguments[1])))
        return die()

    call_in_place(FILE_CALLS[name], name, accident)


Command = Callable[[list[str]], int]
"""A command line -> its exit code."""


def forked(
    arguments: list[str],
    log: Path,
    prepare: Callable[[], object] = lambda: None,
    command: Command = qzo_diffuse,
) -> int:
    """The process id of a child that runs the command line."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        prepare()
        code = command(arguments)
    finally:
        os._exit(code)


def end_of(child: int, seconds: float = TOO_LONG_SECONDS) -> int:
    """Its exit code, negative for a signal; when the time is over it is killed."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def train_arguments(out: Path, work: Path) -> list[str]:
    folders = ["--style-dir", str(work / "images"), "--validation-dir", str(work / "held_out")]
    files = ["--sample-prompts", str(work / "prompts.txt"), f"data.cache_dir={work / 'cache'}"]
    return ["train", *folders, *files, "--output-dir", str(out), *SETTINGS]


def few_files(work: Path) -> None:
    """Eight images, two held out, two prompts: enough for every kind of file that a run writes."""
    source = resources.PACKAGE / "demo_images" / "fluent_mono"
    for name, part, count in (("images", "train", 8), ("held_out", "held_out", 2)):
        rows = (source / part / "metadata.jsonl").read_text().splitlines(keepends=True)[:count]
        (work / name).mkdir()
        (work / name / "metadata.jsonl").write_text("".join(rows))
        for row in rows:
            shutil.copy(source / part / json.loads(row)["file_name"], work / name)
    (work / "prompts.txt").write_text("red apple\nbanana\n")


class Bench:
    """A run that was never stopped, how long it took, and how often it changed files."""

    def __init__(
        self,
        work: Path,
        arguments: Callable[[Path, Path], list[str]] = train_arguments,
        command: Command = qzo_diffuse,
        going_on: tuple[str, ...] = ("train", "--resume"),
    ) -> None:
        """`arguments`: the command line of a run by its folder and `work`; `going_on`: that of a
        run that goes on, without its folder.
        """
        self.work, self.whole, self._arguments = work, work / "whole", arguments
        self._command, self._going_on = command, going_on
        few_files(work)
        # The first run in this process loads every library and fills the cache of encoded images; a
        # forked one is the yardstick.
        if command(arguments(work / "warm", work)):
            sys.exit("the uninterrupted run failed")
        counts = work / "counts.json"

        def count_calls() -> None:
            seen = Counter[str]()
            for name, owner in FILE_CALLS.items():

                def counted(
                    original: Callable[..., Any], *arguments: Any, name: str = name, **options: Any
                ) -> Any:
                    seen[name] += 1
                    if name == "fsync":  # the journal's last one comes at the end of the run
                        counts.write_text(json.dumps(seen))
                    return original(*arguments, **options)

                call_in_place(owner, name, counted)

        began = time.monotonic()
        if end_of(forked(arguments(self.whole, work), work / "whole.log", count_calls, command)):
            sys.exit((work / "whole.log").read_text())
        self.seconds = time.monotonic() - began
        self.calls = Counter[str](json.loads(counts.read_text()))

    def trial(self, index: int, seed: int) -> dict[str, Any]:
        chance = random.Random(f"{seed}/{index}")
        run, log, done = (self.work / f"trial_{index}{end}" for end in ("", ".log", ".done"))
        found: dict[str, Any] = {"trial": index, "kills": 1, "lost": 0}

        def prepare() -> None:
            note_completed_steps(done)
            if index % 5 == 2:
                tear_a_record(random.Random(f"{seed}/{index}/moment"))
            elif index % 5 > 2:
                die_at_a_file(random.Random(f"{seed}/{index}/moment"), self.calls)

        child = forked(self._arguments(run, self.work), log, prepare, self._command)
        code = end_of(child, chance.uniform(0.0, self.seconds)) if index % 5 < 2 else end_of(child)
        found["moment"] = self.moment(index, seed)
        found["ended_before"] = code == 0
        found["completed"] = self.completed(done)
        if index % 5 == 4 and (run / "journal.qzo").exists():
            noting = partial(note_completed_steps, done)
            child = forked(self.go_on(run), log, noting, self._command)
            end_of(child, chance.uniform(0.0, self.seconds))
            found["kills"] = 2
        code = end_of(forked(self.go_on(run), log, command=self._command))
        wrong = (
            self.differences(run) if code == 0 else [f"exit code {code}: {log.read_text()[-800:]}"]
        )
        if code == 0:
            found["lost"] = max(0, self.completed(done) - self.resumed_at(run))
        found["wrong"] = wrong
        if not wrong and not found["lost"]:
            shutil.rmtree(run)
            log.unlink()
        return found

    def moment(self, index: int, seed: int) -> str:
        """In words; the draws are those of the child."""
        chance = random.Random(f"{seed}/{index}/moment")
        if index % 5 < 2:
            return (
                f"after {random.Random(f'{seed}/{index}').uniform(0.0, self.seconds):.2f} of "
                f"{self.seconds:.2f} s"
            )
        if index % 5 == 2:
            return f"in the writing of step {chance.randint(1, STEPS) - 1}"
        name = chance.choice(sorted(FILE_CALLS))
        last = chance.randint(1, self.calls[name])
        return (
            f"{'after' if chance.random() < 0.5 else 'before'} call {last} of {self.calls[name]} "
            f"of {name}"
        )

    def go_on(self, run: Path) -> list[str]:
        if (run / "config.yaml").exists():
            return [*self._going_on, str(run)]
        # killed before the run's first file: nothing to lose, and nothing to resume
        shutil.rmtree(run, ignore_errors=True)
        return self._arguments(run, self.work)

    @staticmethod
    def completed(done: Path) -> int:
        return done.stat().st_size if done.exists() else 0

    @staticmethod
    def resumed_at(run: Path) -> int:
        """Where the last resume went on."""
        notes = [
            entry
            for entry in read_journal(run / "journal.qzo").entries
            if getattr(entry, "kind", "") == "resume"
        ]
        return int(notes[-1].content["step"]) if notes else 0  # type: ignore[union-attr]

    def differences(self, other: Path) -> list[str]:
        """What is not bit for bit as in the whole run."""
        found = []
        if without_seconds(self.whole) != without_seconds(other):
            found.append("metrics.jsonl")
        for pattern in (
            "samples/*",
            "rewards.json",
            "votes.jsonl",
            "final/*.safetensors",
            "checkpoints/*/*.safetensors",
        ):
            names = [
                sorted(str(path.relative_to(run)) for path in run.glob(pattern))
                for run in (self.whole, other)
            ]
            if names[0] != names[1]:
                found.append(f"{names[1]} instead of {names[0]}")
                continue
            found += [
                name for name in names[0] if not same_content(self.whole / name, other / name)
            ]
        if (
            read_journal(self.whole / "journal.qzo").steps
            != read_journal(other / "journal.qzo").steps
        ):
            found.append("journal.qzo")
        return found


def same_content(first: Path, second: Path) -> bool:
    if first.suffix != ".safetensors":
        return first.read_bytes() == second.read_bytes()
    one, other = load_tensors(first)[0], load_tensors(second)[0]
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def without_seconds(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def figures_of(trials: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    bad = [trial for trial in trials if trial["wrong"] or trial["lost"]]
    return {
        "seed": seed,
        "trials": len(trials),
        "identical": sum(not trial["wrong"] for trial in trials),
        "lost_steps": sum(trial["lost"] for trial in trials),
        "kills": sum(trial["kills"] for trial in trials),
        "ended_before_the_kill": sum(trial["ended_before"] for trial in trials),
        "killed_after_steps": dict(sorted(Counter(trial["completed"] for trial in trials).items())),
        "failures": bad,
        "all": trials,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="stop after so long; the same command goes on"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="forget the trials that are in the results already"
    )
    args = parser.parse_args()
    limit = time.monotonic() + 60 * args.minutes
    known = RESULTS / "kill_resume.json"
    trials: list[dict[str, Any]] = []
    if known.exists() and not args.fresh:
        before = json.loads(known.read_text())
        trials = before["all"] if before["seed"] == args.seed else []
    bench = Bench(Path(tempfile.mkdtemp(prefix="qzo_kill_")))
    for index in range(len(trials), args.trials):
        if time.monotonic() > limit:
            break
        trials.append(bench.trial(index, args.seed))
        print(trials[-1], file=sys.stderr, flush=True)
    figures = figures_of(trials, args.seed)
    print(
        write_results("kill_resume", figures),
        {name: figures[name] for name in ("trials", "identical", "lost_steps")},
    )
    if not figures["failures"]:
        shutil.rmtree(bench.work)


if __name__ == "__main__":
    main()
