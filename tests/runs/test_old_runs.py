"""Runs that an earlier commit left still load, go on, are replayed, sampled and exported, bit for
bit.

`old_runs.py` says how they were made. What a model computes is compared bit for bit where this
machine rounds as the one that made them (`old_runs.arithmetic`), and up to rounding elsewhere; what
is rebuilt from a journal has the same bits everywhere.
"""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from qzo_diffusion.cli import main
from qzo_diffusion.config.files import load_config
from qzo_diffusion.config.llm import LlmConfig
from qzo_diffusion.config.style import Config
from qzo_diffusion.core.journal import read_journal
from qzo_diffusion.diffusion.sampling import load_picture
from tests.conftest import metrics
from tests.runs import old_runs

OLD = Path(__file__).with_name("old")
FACTS = json.loads((OLD / "facts.json").read_text())
STYLE_RUNS = ["default", "momentum"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The models and data of the old runs, and the runs, with their paths as they are here."""
    root = tmp_path_factory.mktemp("old")
    old_runs.write_inputs(root)
    for name in old_runs.RUNS:
        shutil.copytree(OLD / name, root / name)
    for file in root.glob("*/*/config.yaml"):
        if old_runs.ROOT in file.read_text():
            file.write_text(file.read_text().replace(old_runs.ROOT, str(root)))
    return root


@pytest.fixture(autouse=True)
def _inside(root, monkeypatch):
    """Their settings name model, prompts and cache from there."""
    monkeypatch.chdir(root)


@pytest.fixture(scope="module")
def rounds_alike():
    return old_runs.arithmetic() == FACTS["arithmetic"]


def scales_equal(first, second):
    one, other = (load_file(folder / "scales.safetensors") for folder in (first, second))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def one_number_a_key(line):
    """A line of metrics.jsonl as it is written now; it had a number for each direction."""

    def one(name, values):
        if not isinstance(values, list):
            return values
        if name in ("loss_plus", "loss_minus"):
            return math.fsum(values) / len(values)
        return math.sqrt(math.fsum(d * d for d in values) / len(values))

    return {name: one(name, values) for name, values in line.items()}


def assert_same_losses(run, old, rounds_alike):
    lines = [[one_number_a_key(line) for line in metrics(folder)] for folder in (run, old)]
    for line, before in zip(*lines, strict=True):
        assert line.keys() == before.keys()
        for name, value in before.items():
            if value is None or isinstance(value, bool):
                assert line[name] == value
            elif rounds_alike or name in ("loss_plus", "loss_minus", "loss"):
                close = pytest.approx(value, rel=1e-12 if rounds_alike else 1e-4)
                assert line[name] == close, (before["step"], name)


def assert_same_run(run, old, rounds_alike):
    assert_same_losses(run, old, rounds_alike)
    steps, before = read_journal(run / "journal.qzo").steps, read_journal(old / "journal.qzo").steps
    assert len(steps) == len(before)
    if rounds_alike:
        assert steps == before
        assert scales_equal(run / "final", old / "final")


@pytest.mark.parametrize("name", old_runs.RUNS)
def test_their_settings_load(root, name):
    kind = LlmConfig if old_runs.RUNS[name][0] == "llm" else Config
    config = load_config(root / name / "whole/config.yaml", kind)
    assert config.train.max_steps == 6
    assert config.compute.dtype == "float32"


@pytest.mark.parametrize("name", old_runs.RUNS)
def test_a_stopped_one_goes_on_to_the_same_end(root, tmp_path, rounds_alike, name):
    run = shutil.copytree(root / name / "stopped", tmp_path / "run")
    assert len(read_journal(run / "journal.qzo").steps) == 4
    command = ["llm", "train"] if old_runs.RUNS[name][0] == "llm" else ["train"]
    same_place = ["--output-dir", str(run)] if command[0] == "llm" else []
    assert main([*command, "--resume", str(run), *same_place]) == 0
    assert_same_run(run, root / name / "whole", rounds_alike)


@pytest.mark.parametrize("name", STYLE_RUNS)
def test_their_settings_repeat_them(root, tmp_path, rounds_alike, name):
    config = root / name / "whole/config.yaml"
    assert main(["train", "--config", str(config), "--output-dir", str(tmp_path / "run")]) == 0
    assert_same_run(tmp_path / "run", root / name / "whole", rounds_alike)
    if rounds_alike:
        for file in sorted((root / name / "whole/samples").glob("*.png")):
            again = Image.open(tmp_path / "run/samples" / file.name)
            assert again.tobytes() == Image.open(file).tobytes(), file.name


@pytest.mark.parametrize("name", old_runs.RUNS)
def test_their_journals_are_replayed(root, tmp_path, name):
    journal = root / name / "whole/journal.qzo"
    model = root / ("pipeline" if name in STYLE_RUNS else "llama")
    command = ["replay", "--journal", str(journal), "--model", str(model)]
    assert main([*command, "--output-dir", str(tmp_path / "end")]) == 0
    assert scales_equal(tmp_path / "end/final", root / name / "whole/final")
    assert main([*command, "--to-step", "4", "--output-dir", str(tmp_path / "4")]) == 0
    assert scales_equal(tmp_path / "4/final", root / name / "stopped/checkpoints/step_000004")


@pytest.mark.parametrize("name", STYLE_RUNS)
@pytest.mark.parametrize("kind", ["delta", "bf16", "nf4"])
def test_their_exports_have_the_same_bits(root, tmp_path, name, kind):
    arguments = ["--run", str(root / name / "whole"), "--output-dir", str(tmp_path / "out")]
    arguments += ["--layout", "both"] if kind == "bf16" else []
    assert main(["export", "--format", kind, *arguments]) == 0
    assert old_runs.hash_of(tmp_path / "out") == FACTS["exports"][f"{name} {kind}"]


@pytest.mark.parametrize("name", STYLE_RUNS)
def test_they_and_their_deltas_are_sampled(root, tmp_path, rounds_alike, name):
    pictures = {}
    for part in ("whole", "delta"):
        out = tmp_path / part
        assert main(["sample", "--run", str(root / name / part), "--output-dir", str(out)]) == 0
        pictures[part] = [
            Image.open(out / f"samples/{index:03d}.png") for index in range(len(old_runs.PROMPTS))
        ]
    assert [one.tobytes() for one in pictures["whole"]] == [
        one.tobytes() for one in pictures["delta"]
    ]
    grid = load_picture(root / name / "whole/samples/step_000006.png")
    if rounds_alike:
        first = pictures["whole"][0]
        top = grid.height - 128 * len(old_runs.PROMPTS)
        cell = grid.crop((0, top, 128, top + 128)).resize(first.size, Image.Resampling.NEAREST)
        assert cell.tobytes() == first.tobytes()
