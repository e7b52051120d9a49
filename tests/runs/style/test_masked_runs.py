"""Whole runs on masked images."""

import numpy as np
import pytest
from PIL import Image

from qzo_diffusion.core.journal import read_journal
from tests.conftest import failing, metrics
from tests.runs.short_run import load_equal

STEPS = ["--max-steps", 2, "train.validate_every=1", "data.flip=true"]


def write_masked(folder, kind, hidden):
    """Six drawings, four of them with masks; `hidden` chooses what is under these."""
    folder.mkdir(parents=True)
    for index in range(6):
        pixels = np.random.default_rng(index).integers(0, 256, (64, 64, 3), np.uint8)
        mask = np.full((64, 64), 255, np.uint8)
        if index < 4:
            mask[:, 8 * (index + 2) :] = 0
        under = np.random.default_rng(hidden).integers(0, 256, (64, 64, 3), np.uint8)
        pixels[mask == 0] = under[mask == 0]
        if kind == "alpha":
            Image.fromarray(np.dstack([pixels, mask])).save(folder / f"{index}.png")
        else:
            Image.fromarray(pixels).save(folder / f"{index}.png")
            Image.fromarray(mask).save(folder / f"{index}_mask.png")
        (folder / f"{index}.txt").write_text(f"square {index}")
    return folder


@pytest.mark.parametrize("kind", ["alpha", "file"])
def test_what_lies_under_a_mask_changes_no_bit_of_a_run(train, tmp_path, kind):
    runs = []
    for hidden in (100, 200):
        images = write_masked(tmp_path / f"imgs{hidden}", kind, hidden)
        held_out = write_masked(tmp_path / f"held_out{hidden}", kind, hidden + 1)
        places = ["--validation-dir", held_out, f"data.masks={kind}"]
        assert train(*STEPS, *places, name=f"run{hidden}", style_dir=images) == 0
        runs.append(tmp_path / f"run{hidden}")
    one, other = runs
    assert metrics(one) == metrics(other)
    assert any("validation_loss" in line for line in metrics(one))
    steps = [read_journal(run / "journal.qzo").steps for run in runs]
    assert steps[0] == steps[1]
    assert load_equal(one, other)


def test_a_mask_changes_the_loss_and_masks_go_with_a_prior(train, tmp_path):
    images = write_masked(tmp_path / "with_masks", "file", 100)
    losses = []
    for name, masks in (("whole", "none"), ("masked", "file")):
        prior = ["prior.weight=0.5", "prior.batch_size=2", "sample.steps=1"]
        settings = ["--max-steps", 1, f"data.masks={masks}", *prior]
        assert train(*settings, name=name, style_dir=images) == 0
        losses.append(metrics(tmp_path / name)[-1])
    assert losses[0] != losses[1]


def test_masks_that_are_missing_are_the_users_mistake(train, tmp_path, capsys):
    error = failing(capsys, train("--max-steps", 1, "data.masks=file"))
    assert "NAME_mask.png" in error
    assert not (tmp_path / "run").exists()
