"""A short run that tests stop, damage and let go on: how it is made and compared."""

import os
import signal

import torch

from qzo_diffusion.cli import main
from qzo_diffusion.core.journal import read_journal
from qzo_diffusion.runs.trainer import Trainer
from qzo_diffusion.runs.tuned import load_scales
from tests.conftest import metrics

SETTINGS = [
    "--max-steps",
    6,
    "train.checkpoint_every=2",
    "sample.every=3",
    "train.optimizer=momentum",
    "qzo.parametrization=dense",
]


def stop_after(monkeypatch, step):
    """SIGTERM to this process when the step was recorded."""
    original = Trainer.on_step

    def on_step(self, record):
        original(self, record)
        if record.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "on_step", on_step)


def in_parts(train, tmp_path, monkeypatch, *run, after):
    """The folder of a run that was stopped when the step was recorded, and went on."""
    with monkeypatch.context() as patch:
        stop_after(patch, after)
        assert train(*run, name="parts") == 130
    assert resume(tmp_path / "parts") == 0
    return tmp_path / "parts"


def assert_same_run(first, second):
    assert metrics(first) == metrics(second)
    scales, others = load_scales(first)[0], load_scales(second)[0]
    assert scales.keys() == others.keys()
    assert all(torch.equal(scales[name], others[name]) for name in scales)
    pictures = sorted(path.name for path in (first / "samples").iterdir())
    assert pictures == sorted(path.name for path in (second / "samples").iterdir())
    for name in pictures:
        assert (first / "samples" / name).read_bytes() == (
            second / "samples" / name
        ).read_bytes(), name
    assert read_journal(first / "journal.qzo").steps == read_journal(second / "journal.qzo").steps


def load_equal(first, second):
    one, other = load_scales(first)[0], load_scales(second)[0]
    return all(torch.equal(one[name], other[name]) for name in one)


def resume(folder, *arguments):
    return main(["train", "--resume", str(folder), *map(str, arguments)])


def replay(tmp_path, run, *arguments, name="replayed"):
    out = tmp_path / name
    return main(
        [
            "replay",
            "--journal",
            str(run / "journal.qzo"),
            "--output-dir",
            str(out),
            *map(str, arguments),
        ]
    ), out


def assert_replayed(run):
    again = run.with_name("again")
    assert main(["replay", "--journal", str(run / "journal.qzo"), "--output-dir", str(again)]) == 0
    scales, replayed = load_scales(run)[0], load_scales(again)[0]
    assert all(torch.equal(replayed[name], scales[name]) for name in scales)
