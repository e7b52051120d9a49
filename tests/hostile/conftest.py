"""A finished run, which tests forge, damage and sample again."""

import pytest

from qzo_diffusion.cli import main
from tests.conftest import write_squares


@pytest.fixture(scope="session")
def run(tmp_path_factory, command_line):
    """A finished run of one step on a small random model, its images and prompts beside it."""
    place = tmp_path_factory.mktemp("hostile")
    (place / "prompts.txt").write_text("red apple\n")
    images = write_squares(place / "imgs", [(90 * index, 0, 50) for index in range(2)])
    places = {"style_dir": images, "prompts": place / "prompts.txt", "output_dir": place / "run"}
    quick = ["data.batch_size=1", "sample.steps=1", "train.calibrate_lr=false"]
    more = ["--max-steps", 1, "--caption", "a square", "train.checkpoint_every=1"]
    assert main(command_line(*more, *quick, **places)) == 0
    return place / "run"
