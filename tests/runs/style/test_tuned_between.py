"""`sample.tuned_between` in grids of a run, `sample`, `evaluate` and an export's card.

The four steps of these samples are at noise levels 1, 0.86, 0.61 and 0.03.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from qzo_diffusion.cli import main
from qzo_diffusion.config.files import make_config
from qzo_diffusion.diffusion.pipeline_shape import known_shape
from qzo_diffusion.diffusion.sampling import cells, load_picture
from qzo_diffusion.evaluate import signal
from qzo_diffusion.runs.style import pipeline
from qzo_diffusion.runs.style.memory import memory_plan
from tests.conftest import failing, metrics
from tests.runs.short_run import load_equal

STEPS = ["--max-steps", 2, "train.lr=0.05", "sample.steps=4"]
FIRST_STEP, LATER_STEPS, NO_STEP = ["0.9", "1"], ["0", "0.9"], ["0.7", "0.8"]

DENSE = ["qzo.parametrization=dense", "train.lr=2"]


@pytest.fixture
def draw(tmp_path, prompts, capsys):
    """Pictures of `sample` as bytes, by the number of the prompt."""

    def call(run, *arguments):
        out = tmp_path / "pictures"
        shutil.rmtree(out, ignore_errors=True)
        places = ["--run", run, "--prompts", prompts, "--output-dir", out]
        assert main(["sample", *map(str, places), *arguments]) == 0
        capsys.readouterr()
        return [(out / "samples" / f"{at:03d}.png").read_bytes() for at in range(2)]

    return call


def test_each_step_of_sampling_uses_the_scales_of_its_level(train, tmp_path, draw):
    assert train(*STEPS) == 0
    run = tmp_path / "run"
    tuned, base = draw(run), draw(run, "--strength", "0")
    assert draw(run, "--tuned-between", "0", "1") == tuned
    assert draw(run, "--tuned-between", *NO_STEP) == base
    parts = [draw(run, "--tuned-between", *levels) for levels in (FIRST_STEP, LATER_STEPS)]
    half = draw(run, "--tuned-between", *LATER_STEPS, "--strength", "0.5")
    for at in range(2):
        assert len({one[at] for one in (tuned, base, *parts, half)}) == 5


@pytest.mark.parametrize("method", [DENSE, ["method=quzo", "train.lr=0.3"]])
def test_grids_use_them_and_training_does_not(train, tmp_path, draw, method):
    assert train(*STEPS, *method, name="whole") == 0
    assert train(*STEPS, *method, "sample.tuned_between=[0, 0.9]", name="part") == 0
    part, whole = tmp_path / "part", tmp_path / "whole"
    assert metrics(part) == metrics(whole)
    assert load_equal(part, whole)
    own = draw(part)
    assert own == draw(whole, "--tuned-between", *LATER_STEPS)
    assert own != draw(whole)
    assert draw(part) == own
    picture = Image.open(tmp_path / "pictures" / "samples" / "000.png")
    shown = cells(load_picture(part / "samples" / "step_000002.png"), 2)[0]
    assert picture.tobytes() == shown.resize(picture.size, Image.Resampling.NEAREST).tobytes()


def test_outside_is_the_base_also_of_a_run_that_begins_with_another(train, tmp_path, draw):
    assert train(*STEPS, *DENSE, name="first") == 0
    begin = ["--init-from", tmp_path / "first", *DENSE]
    assert train(*STEPS, *begin, "sample.tuned_between=[0.7, 0.8]", name="second") == 0
    grids = [tmp_path / run / f"samples/step_{step:06d}.png" for run, step in GRIDS]
    base, tuned, *others = [cells(load_picture(grid), 2) for grid in grids]
    for at in range(2):
        assert tuned[at].tobytes() != base[at].tobytes()
        assert {cell[at].tobytes() for cell in others} == {base[at].tobytes()}


GRIDS = [("first", 0), ("first", 2), ("second", 0), ("second", 2)]


def test_an_evaluation_scores_the_pictures_that_they_give(
    train, tmp_path, prompts, held_out, monkeypatch
):
    monkeypatch.setattr(signal, "DIRECTIONS", 4)
    monkeypatch.setattr(signal, "REPEATS", 1)
    assert train(*STEPS, "--validation-dir", held_out) == 0
    run = tmp_path / "run"
    command = ["evaluate", "--run", str(run), "--prompts", str(prompts), "--scorer", "embedded"]
    changes = []
    for levels in (NO_STEP, LATER_STEPS):
        assert main([*command, "--tuned-between", *levels]) == 0
        found = json.loads((run / "evaluation.json").read_text())
        assert found["sampling"]["tuned_between"] == [float(level) for level in levels]
        assert found["validation_loss"]["delta"] != 0
        changes.append(found["style"]["similarity"]["delta"])
    assert changes[0] == 0
    assert changes[1] != 0


def test_the_card_of_an_export_says_how_comfyui_does_the_same(train, tmp_path):
    assert train("--max-steps", 0, "sample.tuned_between=[0, 0.7]", "sample.steps=20") == 0
    out = tmp_path / "out"
    command = ["export", "--run", tmp_path / "run", "--format", "bf16", "--output-dir", out]
    assert main(list(map(str, command))) == 0
    card = (out / "README.md").read_text()
    assert "KSampler (Advanced)" in card
    # the small model's shift is 3: 3 (1 - x) / (1 + 2 (1 - x)) = 0.7 at x = 0.5625
    assert "| the base | enable | 0 | 12 | enable |" in card
    assert "| this one | disable | 12 | 20 | disable |" in card


@pytest.mark.parametrize(
    ("levels", "words"),
    [
        (["0.7", "0.2"], ["sample.tuned_between", "LOW below HIGH"]),
        (["0.2", "1.5"], ["1.5", "noise level from 0 to 1"]),
        (["0.2", "0.9"], ["without --run"]),
    ],
)
def test_levels_that_can_not_be_are_refused(tmp_path, capsys, train, levels, words):
    run = []
    if "without --run" not in words:
        assert train("--max-steps", 0) == 0
        run = ["--run", str(tmp_path / "run")]
    capsys.readouterr()
    out = ["--output-dir", str(tmp_path / "out")]
    error = failing(capsys, main(["sample", *run, *out, "--tuned-between", *levels]))
    for word in words:
        assert word in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["[0.7, 0.2]", "[0.1]", "0.5", "[0, 2]", "[low, high]"])
def test_settings_that_can_not_be_are_refused(train, capsys, value):
    error = failing(capsys, train("--max-steps", 1, f"sample.tuned_between={value}"))
    assert "sample.tuned_between" in error


def test_the_levels_of_training_are_drawn_inside_and_held_out_ones_are_not(
    train, tmp_path, held_out
):
    settings = ["--max-steps", 3, "--validation-dir", held_out, "train.validate_every=1"]
    assert train(*settings, name="whole") == 0
    assert train(*settings, "sigma.min=0.8", "sigma.max=0.9", name="part") == 0
    runs = [metrics(tmp_path / name) for name in ("whole", "part")]
    means = [line["sigma_mean"] for line in runs[1] if "loss" in line]
    assert len(means) == 3
    assert all(0.8 < mean < 0.9 for mean in means)
    start = [next(line for line in run if "validation_loss" in line) for run in runs]
    assert start[0] == start[1]
    settings = yaml.safe_load((tmp_path / "part" / "config.yaml").read_text())
    assert (settings["sigma"]["min"], settings["sigma"]["max"]) == (0.8, 0.9)


@pytest.mark.parametrize("method", ["qzo", "quzo"])
def test_the_memory_plan_counts_the_copy_of_what_is_trained(method):
    name = "stabilityai/stable-diffusion-3.5-large"
    place = pipeline.Runtime(Path(name), torch.device("cpu"), torch.bfloat16, known_shape(name))
    given = {"model": name, "method": method}
    plans = [
        memory_plan(make_config(given | {"sample": {"tuned_between": levels}}), place)
        for levels in (None, [0.0, 0.7])
    ]
    for before, after in zip(*(plan.phases for plan in plans), strict=True):
        more = after.total - before.total
        if before.name in ("train", "sample"):
            # 8.0e9 quantized weights: a scale of 4 bytes for 64 of them, or a code for each
            assert (0.49e9 < more < 0.51e9) if method == "qzo" else (8e9 < more < 9e9)
