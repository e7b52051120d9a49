"""Damage journals and checkpoints at random and try to use them: `OMP_NUM_THREADS=1 python -m
benchmarks.corruption`.

Every trial copies a run, truncates, flips, swaps or zeroes bytes of its journal or of a checkpoint
(or swaps two whole records of the journal), and restores it as a resume does. Right is either a
refusal with a message for the user, or numbers and a state of the optimizer that are bit for bit
those of the undamaged run at the step that the program names. Anything else counts as applied
silently or as a traceback. Of those that were right it is counted how often the user was told of
the damage; the rest changed nothing that means anything, such as white space."""

import argparse
import contextlib
import io
import random
import shutil
import tempfile
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.record import write_results
from qzo_diffusion import resources
from qzo_diffusion.cli import main as qzo_diffuse
from qzo_diffusion.config.files import load_config
from qzo_diffusion.core.errors import UserError
from qzo_diffusion.core.journal import read_journal, replay_
from qzo_diffusion.runs import build
from qzo_diffusion.runs.style import pipeline
from qzo_diffusion.train.checkpoint import list_checkpoints, restore_

STEPS = 8
KINDS = ("truncate", "flip", "swap", "zero")


class Bench:
    """A finished run, its base model in memory, and the right numbers of every step."""

    def __init__(self, work: Path) -> None:
        self.run = work / "run"
        images = resources.PACKAGE / "demo_images" / "fluent_mono" / "train"
        arguments = [
            "train",
            "--model",
            "tiny",
            "--style-dir",
            str(images),
            "--output-dir",
            str(self.run),
        ]
        arguments += [
            f"data.cache_dir={work / 'cache'}",
            "--max-steps",
            str(STEPS),
            "train.checkpoint_every=3",
            "sample.steps=1",
        ]
        arguments += ["data.batch_size=2", "qzo.parametrization=row", "train.optimizer=adam"]
        with contextlib.redirect_stderr(io.StringIO()):
            assert qzo_diffuse(arguments) == 0
        self.config = load_config(self.run / "config.yaml")
        _, _, self.theta = pipeline.load_base(self.config, pipeline.find_runtime(self.config))
        self.journal = read_journal(self.run / "journal.qzo")
        self.right = {step: self.state_at(step) for step in range(STEPS + 1)}

    def state_at(self, step: int) -> dict[str, Tensor]:
        self.reset()
        optimizer = build.optimizer(self.config)
        replay_(self.journal, self.theta, optimizer, to_step=step)
        return {
            name: tensor.clone()
            for name, tensor in (self.theta.state() | optimizer.state()).items()
        }

    def reset(self) -> None:
        for tensor in self.theta.state().values():
            tensor.zero_()

    def restore(self, run: Path) -> str:
        """ "refused", "right_and_told", "right" or "silent"."""
        self.reset()
        optimizer = build.optimizer(self.config)
        try:
            journal = read_journal(run / "journal.qzo")
            checkpoints, problems = list_checkpoints(run / "checkpoints")
            step = restore_(
                checkpoints[-1] if checkpoints else None, journal, self.theta, optimizer
            )
        except UserError:
            return "refused"
        state = self.theta.state() | optimizer.state()
        if state.keys() != self.right[step].keys() or any(
            not torch.equal(state[n], t) for n, t in self.right[step].items()
        ):
            return "silent"
        told = problems or journal.torn_bytes or step < STEPS  # a resume says all three
        return "right_and_told" if told else "right"

    def damage(self, path: Path, kind: str, chance: random.Random) -> str:
        """Change the file; says how."""
        before = path.read_bytes()
        data = bytearray(before)
        while data == before:
            data = bytearray(before)
            at, length = chance.randrange(len(data)), chance.randint(1, 32)
            if kind == "truncate":
                del data[at:]
            elif kind == "flip":
                data[at] ^= 1 << chance.randrange(8)
            elif kind == "zero":
                data[at : at + length] = bytes(len(data[at : at + length]))
            elif path.name == "journal.qzo" and chance.random() < 0.5:
                ends = (self.journal.header_size, *self.journal.sizes)
                one, other = sorted(chance.sample(range(len(ends) - 1), 2))
                parts = [before[start:end] for start, end in pairwise(ends)]
                parts[one], parts[other] = parts[other], parts[one]
                data = bytearray(before[: ends[0]] + b"".join(parts))
            else:
                other = chance.randrange(len(data))
                data[at], data[other] = data[other], data[at]
        path.write_bytes(data)
        return f"{kind} at {at} of {path.name}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="qzo_corruption_"))
    bench, chance = Bench(work), random.Random(args.seed)
    counts = dict.fromkeys(("refused", "right_and_told", "right", "silent", "traceback"), 0)
    failures, kinds = [], dict.fromkeys(KINDS, 0)
    for _ in tqdm(range(args.trials), desc="corruptions"):
        copy = work / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(
            bench.run, copy, ignore=shutil.ignore_patterns("samples", "tensorboard", "final")
        )
        journal, kind = copy / "journal.qzo", chance.choice(KINDS)
        files = [
            file
            for file in sorted((copy / "checkpoints").rglob("*"))
            if file.is_file() and file.stat().st_size
        ]
        target = journal if chance.random() < 0.5 else chance.choice(files)
        what = bench.damage(target, kind, chance)
        kinds[kind] += 1
        try:
            outcome = bench.restore(copy)
        except Exception as error:
            outcome = "traceback"
            what += f": {error!r}"
        counts[outcome] += 1
        if outcome in ("silent", "traceback"):
            failures.append(what)
    figures = {
        "trials": args.trials,
        "seed": args.seed,
        "kinds": kinds,
        "applied_silently": counts["silent"],
        "tracebacks": counts["traceback"],
        "refused": counts["refused"],
        "used_right_and_told": counts["right_and_told"],
        "used_right_and_meaningless": counts["right"],
        "failures": failures,
    }
    print(write_results("corruption", figures))
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
