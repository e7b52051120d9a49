"""A step on a busy and on an idle machine, against another commit: `python -m benchmarks.busy
--before FOLDER`, on a machine that does nothing else.

FOLDER is a checkout of the other commit (`git worktree add FOLDER COMMIT`). Both train `tiny` with
default settings on the images of `make demo`, a thread for each core, in turn and in processes of
their own, with no variable that says how OpenMP's threads wait. On the busy machine another process
spins on each core. A cell is the median step of one run; ratios are medians over the rounds. The
results are the part `busy` of everyday.json."""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from benchmarks.record import update_results
from qzo_diffusion.resources import PACKAGE

HERE = Path(__file__).parents[1]
STYLE = PACKAGE / "demo_images" / "fluent_mono"
FIRST_STEPS = 5  # which also load code and fill caches
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # variables that are taken away
QUICK = (
    "train.validate_every=0",
    "train.checkpoint_every=0",
    "sample.every=0",
    "sample.steps=2",
    "qzo.parametrization=separable",  # the same numbers, whatever is the default of a commit
    "qzo.layers=null",
)


@contextlib.contextmanager
def spinning(processes: int) -> Iterator[None]:
    """So many processes that do nothing but take a core."""
    others = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)
    ]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def step_seconds(code: Path, steps: int, cores: int) -> float:
    """The median step of a default run of the code in a folder."""
    environment = {name: value for name, value in os.environ.items() if name not in WAITING}
    environment |= {"OMP_NUM_THREADS": str(cores), "PYTHONPATH": str(code)}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "qzo_diffusion.cli", "train", "--model", "tiny"]
        command += ["--style-dir", str(STYLE / "train"), "--max-steps", str(steps)]
        command += ["--validation-dir", str(STYLE / "held_out"), "--output-dir", str(run)]
        subprocess.run([*command, *QUICK], cwd=code, env=environment, check=True)
        entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = [entry["seconds"] for entry in entries if "seconds" in entry]
    return statistics.median(seconds[FIRST_STEPS:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--before", type=Path, required=True, help="checkout of the other commit")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    cores = os.cpu_count() or 1
    codes = {"before": args.before.resolve(), "now": HERE}
    cells: dict[str, list[float]] = {}
    for turn in tqdm(range(args.rounds), desc="rounds"):
        for name, processes in (("idle", 0), ("busy", cores)):
            # neither is always the first
            for code in sorted(codes, reverse=bool(turn % 2)):
                with spinning(processes):
                    seconds = step_seconds(codes[code], args.steps, cores)
                cells.setdefault(f"{name}_{code}", []).append(seconds)
    path = update_results(
        "everyday",
        "busy",
        {
            "busy_speedup": ratio(cells["busy_before"], cells["busy_now"]),
            "idle_ratio": ratio(cells["idle_now"], cells["idle_before"]),
        },
        {"step_seconds": cells, "steps": args.steps, "before": commit(codes["before"])},
    )
    print(f"wrote {path}")


def ratio(above: list[float], below: list[float]) -> float:
    """The median ratio of cells of the same round."""
    pairs = zip(above, below, strict=True)
    return round(statistics.median(one / other for one, other in pairs), 3)


def commit(code: Path) -> str:
    command = ["git", "-C", str(code), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
