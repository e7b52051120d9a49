"""A finished run, which tests forge, damage and sample again."""

import pytest

from qzo_diffusion.cli import main


@pytest.fixture(scope="module")
def run(tmp_path_factory, pipeline):
    """A finished run of one step on a small random model, its prompts beside it."""
    from PIL import Image

    place = tmp_path_factory.mktemp("hostile")
    (place / "imgs").mkdir()
    for index in range(2):
        Image.new("RGB", (64, 64), (90 * index, 0, 50)).save(place / "imgs" / f"{index}.png")
    (place / "prompts.txt").write_text("red apple\n")
    arguments = ["train", "--model", str(pipeline), "--style-dir", str(place / "imgs")]
    arguments += ["--max-steps", "1"]
    arguments += [
        "--output-dir",
        str(place / "run"),
        "--sample-prompts",
        str(place / "prompts.txt"),
    ]
    arguments += [f"data.cache_dir={place / 'cache'}", "data.batch_size=1", "sample.steps=1"]
    arguments += ["sample.every=0", "train.validate_every=0", "train.checkpoint_every=1"]
    arguments += ["train.calibrate_lr=false", "compute.dtype=float32", "data.caption=a square"]
    assert main(arguments) == 0
    return place / "run"
