"""Forge files of every kind that the program reads, and read them: `OMP_NUM_THREADS=1 python -m
benchmarks.hostile`.

A forgery flips bits, cuts, swaps, repeats or overwrites bytes, puts a huge or negative number in
the place of one that the file holds, or nests and repeats values beyond measure
(`benchmarks.forged`). Right is a refusal with a message for the user, or numbers that the file
really holds.

used_silently: a reader used other numbers than the file was written with and said nothing, where a
checksum could have told (journal, checkpoint, tuned scales with their marker, caches); or used
numbers that are not finite, also where every checksum was made anew (models, tuned scales).
tracebacks: any other exception than one for the user, and what takes longer than 10 s. over_memory:
a peak above what was in use before by more than the file's size + 300 MB."""

import argparse
import contextlib
import gc
import io
import random
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from benchmarks.forged import numbers, texts
from benchmarks.forged.reader import Found, Reader
from benchmarks.record import write_results
from qzo_diffusion.core.errors import UserError

SECONDS, MEMORY = 10.0, 300_000_000
OUTCOMES = ("refused", "right", "told", "other", "silent", "traceback", "slow")


class TooSlow(BaseException):
    """Beyond SECONDS; no library catches it."""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    def stop(_signal: int, _frame: object) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def memory(key: str) -> int:
    """Bytes: VmRSS now, or VmHWM, the peak since `reset_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return 0


def reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


class Bench:
    def __init__(self, work: Path, chance: random.Random) -> None:
        self.work, self.chance, self.counts = work, chance, dict.fromkeys(OUTCOMES, 0)
        self.over_memory, self.failures = 0, list[str]()
        self.by_reader: dict[str, dict[str, int]] = {}

    def prepare(self, reader: Reader) -> tuple[Path, bytes, Found]:
        """A folder with whole files, and what the reader finds in it."""
        seed = self.work / "seed"
        shutil.rmtree(seed, ignore_errors=True)
        seed.mkdir()
        reader.make(seed)
        right = reader.use(self.copy(seed))
        return seed, (seed / reader.file).read_bytes(), right

    def copy(self, seed: Path) -> Path:
        copy = self.work / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(seed, copy)
        return copy

    def run(self, reader: Reader, trials: int) -> Iterator[None]:
        seed, data, right = self.prepare(reader)
        for number in range(trials):
            forge = reader.forge[number % len(reader.forge)]
            forged = data
            while forged == data:
                forged = forge(data, self.chance)
            folder = self.copy(seed)
            (folder / reader.file).write_bytes(forged)
            reader.renew(folder)
            place = f"{reader.name} {number}: {forge.__name__}"
            self.count(reader, place, self.trial(reader, folder, right, place), len(forged))
            if self.failures and self.failures[-1].startswith(place):
                kept = self.work.parent / f"forged_{len(self.failures)}_{Path(reader.file).name}"
                kept.write_bytes(forged)
            yield

    def trial(self, reader: Reader, folder: Path, right: Found, place: str) -> str:
        self.started = reset_peak()
        quiet, said = contextlib.ExitStack(), io.StringIO()
        with quiet, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quiet.enter_context(contextlib.redirect_stderr(said))
            quiet.enter_context(contextlib.redirect_stdout(said))
            try:
                begun = time.perf_counter()
                with limited(2 * SECONDS):
                    found = reader.use(folder)
            except UserError:
                return self.in_time(begun, "refused", place)
            except TooSlow:
                return self.in_time(begun, "slow", place)
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                self.failures.append(f"{place}: {error!r:.200} in {where.name}, {where.lineno}")
                return "traceback"
        return self.in_time(begun, self.judged(reader, found, right, place), place)

    def in_time(self, begun: float, outcome: str, place: str) -> str:
        if time.perf_counter() - begun > SECONDS:
            self.failures.append(f"{place}: more than {SECONDS:g} s")
            return "slow"
        return outcome

    def judged(self, reader: Reader, found: Found, right: Found, place: str) -> str:
        if not found.finite:
            self.failures.append(f"{place}: numbers that are not finite")
            return "silent"
        if found.told:
            return "told"
        if found.numbers == right.numbers:
            return "right"
        if reader.protected:
            self.failures.append(f"{place}: other numbers without a word")
            return "silent"
        return "other"

    def count(self, reader: Reader, place: str, outcome: str, size: int) -> None:
        self.counts[outcome] += 1
        of_reader = self.by_reader.setdefault(reader.name, dict.fromkeys(OUTCOMES, 0))
        of_reader[outcome] += 1
        peak = memory("VmHWM") - self.started
        if peak > size + MEMORY:
            self.over_memory += 1
            self.failures.append(f"{place}: {peak / 1e6:.0f} MB for {size / 1e6:.1f}")
        if peak > MEMORY / 3:
            gc.collect()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="readers whose names begin so")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="qzo_hostile_")) / "work"
    work.mkdir()
    bench = Bench(work, random.Random(args.seed))
    chosen = [one for one in numbers.readers() + texts.readers() if one.name.startswith(args.only)]
    with tqdm(total=args.trials, desc="forgeries") as bar:
        for index, reader in enumerate(chosen):
            share = (index + 1) * args.trials // len(chosen) - index * args.trials // len(chosen)
            for _ in bench.run(reader, share):
                bar.update()
    figures = {
        "trials": sum(bench.counts.values()),
        "seed": args.seed,
        "used_silently": bench.counts["silent"],
        "tracebacks": bench.counts["traceback"] + bench.counts["slow"],
        "over_memory": bench.over_memory,
        "outcomes": bench.counts,
        "readers": bench.by_reader,
        "failures": bench.failures,
    }
    if args.only:
        print("\n".join(bench.failures), bench.counts)
    else:
        print(write_results("hostile", figures))
        print("\n".join(bench.failures))
    if not bench.failures:
        shutil.rmtree(work.parent)


if __name__ == "__main__":
    main()
