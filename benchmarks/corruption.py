"""Damage journals and checkpoints at random and try to use them: `OMP_NUM_THREADS=1 python -m benchmarks.corruption`.

Every trial copies a run, truncates, flips, swaps or zeroes bytes of its journal or of a checkpoint, and restores it as a resume
does. Right is either a refusal with a message for the user, or numbers that are bit for bit those of the undamaged run at the step
that the program names. Anything else counts as applied silently or as a traceback.
"""

import argparse
import contextlib
import io
import random
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.record import write_results
from qzo_diffusion import build, resources
from qzo_diffusion.cli import main as qzo_diffuse
from qzo_diffusion.config import load_config
from qzo_diffusion.core.errors import UserError
from qzo_diffusion.core.journal import read_journal, replay_
from qzo_diffusion.train.checkpoint import list_checkpoints, restore_

STEPS = 8
KINDS = ("truncate", "flip", "swap", "zero")


class Bench:
    """A finished run, its base model in memory, and the right numbers of every step."""

    def __init__(self, work: Path) -> None:
        self.run = work / "run"
        images = resources.PACKAGE / "demo_images" / "fluent_mono" / "train"
        arguments = ["train", "--model", "tiny", "--style-dir", str(images), "--output-dir", str(self.run)]
        arguments += [f"data.cache_dir={work / 'cache'}", "--max-steps", str(STEPS), "train.checkpoint_every=3", "sample.steps=1"]
        arguments += ["data.batch_size=2", "qzo.parametrization=row", "train.optimizer=adam"]
        with contextlib.redirect_stderr(io.StringIO()):
            assert qzo_diffuse(arguments) == 0
        self.config = load_config(self.run / "config.yaml")
        folder, _ = build.choose_model("tiny")
        transformer = build.quantized_transformer(self.config, folder, torch.device("cpu"), torch.float32)
        _, self.numbers = build.scales_and_numbers(self.config, transformer)
        self.right = {step: self.numbers_at(step) for step in range(STEPS + 1)}

    def numbers_at(self, step: int) -> dict[str, Tensor]:
        self.reset()
        replay_(read_journal(self.run / "journal.qzo"), self.numbers, build.optimizer(self.config), to_step=step)
        return {name: tensor.clone() for name, tensor in self.numbers.state().items()}

    def reset(self) -> None:
        for tensor in self.numbers.state().values():
            tensor.zero_()

    def restore(self, run: Path) -> str:
        """ "refused", "right" or "silent"."""
        self.reset()
        try:
            journal = read_journal(run / "journal.qzo")
            checkpoints, _ = list_checkpoints(run / "checkpoints")
            newest = checkpoints[-1] if checkpoints else None
            step = restore_(newest, journal, self.numbers, build.optimizer(self.config))
        except UserError:
            return "refused"
        same = all(torch.equal(tensor, self.right[step][name]) for name, tensor in self.numbers.state().items())
        return "right" if same else "silent"


def damage(path: Path, kind: str, chance: random.Random) -> str:
    data = bytearray(path.read_bytes())
    at, length = chance.randrange(len(data)), chance.randint(1, 32)
    if kind == "truncate":
        del data[at:]
    elif kind == "flip":
        data[at] ^= 1 << chance.randrange(8)
    elif kind == "zero":
        data[at : at + length] = bytes(len(data[at : at + length]))
    else:
        other = chance.randrange(len(data))
        data[at], data[other] = data[other], data[at]
    path.write_bytes(data)
    return f"{kind} at {at} of {path.name}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="qzo_corruption_"))
    bench, chance = Bench(work), random.Random(args.seed)
    counts = dict.fromkeys(("refused", "right", "silent", "traceback"), 0)
    failures = []
    for _ in tqdm(range(args.trials), desc="corruptions"):
        copy = work / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(bench.run, copy, ignore=shutil.ignore_patterns("samples", "tensorboard", "final"))
        files = [
            copy / "journal.qzo",
            *sorted((copy / "checkpoints").rglob("*.*")),
            *sorted((copy / "checkpoints").rglob("COMPLETE")),
        ]
        files = [file for file in files if file.is_file() and file.stat().st_size]
        target = files[0] if chance.random() < 0.5 else chance.choice(files)
        what = damage(target, chance.choice(KINDS), chance)
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
        "applied_silently": counts["silent"],
        "tracebacks": counts["traceback"],
        "refused": counts["refused"],
        "used_and_right": counts["right"],
        "failures": failures,
    }
    print(write_results("corruption", figures))
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
