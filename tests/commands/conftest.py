"""Runs that verbs read, made once in a process; who changes one copies it first."""

import shutil

import pytest

from qzo_diffusion import resources
from qzo_diffusion.cli import main
from qzo_diffusion.evaluate import signal
from tests.commands.short_runs import export_arguments, train_no_step
from tests.conftest import write_squares

FEW = 4


@pytest.fixture(autouse=True)
def _few_directions(monkeypatch):
    """Slopes along four directions instead of 24, and one estimate instead of four: the figures are
    coarse, the path is the same.
    """
    monkeypatch.setattr(signal, "DIRECTIONS", FEW)
    monkeypatch.setattr(signal, "REPEATS", 1)


@pytest.fixture(scope="session")
def run_of_no_step(tmp_path_factory, command_line, pipeline):
    return train_no_step(tmp_path_factory.mktemp("evaluate"), command_line, pipeline)


@pytest.fixture
def run(run_of_no_step, tmp_path):
    return shutil.copytree(run_of_no_step, tmp_path / "run")


SQUARES = [(60 * index, 0, 255 - 60 * index) for index in range(4)]


@pytest.fixture(scope="session")
def train_squares(tmp_path_factory, command_line, pipeline):
    """Trains two steps on four coloured squares and one prompt, the model named `tiny`."""

    def train(name, prompt, *settings):
        root = tmp_path_factory.mktemp(name)
        (root / "prompts.txt").write_text(f"{prompt}\n")
        images = write_squares(root / "imgs", SQUARES)
        places = {"style_dir": images, "prompts": root / "prompts.txt", "output_dir": root / "run"}
        common = ["--model", "tiny", "--caption", "a square", "--max-steps", 2, "train.lr=0.05"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(resources, "tiny_model", lambda: pipeline)
            assert main(command_line(*common, *settings, **places)) == 0
        return root / "run"

    return train


@pytest.fixture(scope="session")
def finished(train_squares):
    """A run of dense numbers, which every format is made from."""
    return train_squares("finished", "red apple", "qzo.parametrization=dense")


@pytest.fixture(scope="session")
def coarse(train_squares, tmp_path_factory):
    """A run with other settings than the defaults, and a checkpoint of each of its two steps."""
    held_out = write_squares(tmp_path_factory.mktemp("held_out") / "imgs", SQUARES)
    more = ["--trigger", "zxq", "--validation-dir", held_out, "train.checkpoint_every=1"]
    grid = ["quant.blocksize=128", "data.resolution=96"]
    return train_squares("coarse", "red apple in [trigger] style", *more, *grid)


@pytest.fixture
def export(finished, tmp_path):
    def call(kind, *more, run=finished, name="out"):
        assert main([*export_arguments(run, tmp_path / name, kind), *more]) == 0
        return tmp_path / name

    return call
