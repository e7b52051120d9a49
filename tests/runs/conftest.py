"""One short run as it ended and one that was stopped, made once for all tests of a process."""

import shutil

import pytest
from PIL import Image

from qzo_diffusion.cli import main
from tests.conftest import write_images, write_prompts
from tests.runs.short_run import SETTINGS, stop_after


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """The folder of the shared runs, with their images and prompts."""
    folder = tmp_path_factory.mktemp("shared")
    write_images(folder / "imgs")
    write_prompts(folder)
    return folder


@pytest.fixture(scope="session")
def train_shared(shared, command_line):
    def train(name):
        places = {"style_dir": shared / "imgs", "prompts": shared / "prompts.txt"}
        return main(command_line(*SETTINGS, **places, output_dir=shared / name))

    return train


@pytest.fixture(scope="session")
def whole(shared, train_shared):
    """A run of six steps. Tests read it; whoever changes it copies it first."""
    assert train_shared("whole") == 0
    return shared / "whole"


@pytest.fixture(scope="session")
def stopped_run(shared, train_shared):
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3)
        assert train_shared("stopped") == 130
    return shared / "stopped"


@pytest.fixture
def held_out(tmp_path):
    """A folder of two images that are none of `images`, with captions."""
    folder = tmp_path / "held_out"
    folder.mkdir()
    for index in range(2):
        Image.new("RGB", (64, 64), (0, 90 + 90 * index, 0)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"meadow {index}")
    return folder


@pytest.fixture
def stopped(shared, stopped_run, images, tmp_path):
    """A copy of a run that was stopped after four of six steps, with images of its own."""
    run = shutil.copytree(stopped_run, tmp_path / "parts")
    settings = (run / "config.yaml").read_text()
    assert str(shared / "imgs") in settings
    (run / "config.yaml").write_text(settings.replace(str(shared / "imgs"), str(images)))
    return run
