"""`train --dry-run`, `validate` and `doctor`: they tell, and train nothing."""

import json

import pytest
import torch
import yaml

from qzo_diffusion.cli import main
from qzo_diffusion.runs.style import learn_subspace, vote
from tests.conftest import failing

FOUND = {"file": "subspace.safetensors", "directions": 4}


def test_configs_of_either_kind_are_validated(tmp_path, capsys):
    assert main(["validate", "--config", "sd35_large_8gb.yaml"]) == 0
    capsys.readouterr()
    path = tmp_path / "config.yaml"
    path.write_text("task: sst2\nobjective: accuracy\n")
    assert main(["validate", "--config", str(path)]) == 0
    assert "objective: accuracy" in capsys.readouterr().out
    path.write_text("objective: accuracy\ncaption: a\n")
    error = failing(capsys, main(["validate", "--config", str(path)]))
    assert "unknown setting 'caption'" in error


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ([], "3 images, 8 directions of each: 24 forward passes"),
        (
            ["qzo.num_directions=1"],
            "3 images, 1 direction of each, at both sides: 6 forward passes",
        ),
        (
            ["qzo.per_example=false", "qzo.num_directions=2"],
            "3 images, 2 directions that all share, at both sides: 12 forward passes",
        ),
    ],
)
def test_a_dry_run_tells_what_a_step_costs(train, capsys, settings, told):
    assert train("--dry-run", "data.batch_size=3", *settings) == 0
    assert f"a step    {told}" in capsys.readouterr().out


def test_dry_run_prints_settings_and_data_and_writes_nothing(train, tmp_path, capsys):
    assert train("--dry-run") == 0
    out = capsys.readouterr().out
    assert "max_steps" in out
    assert "6 txt" in out
    assert not (tmp_path / "run").exists()


def test_first_line_says_which_model_and_why(train, capsys):
    train("--dry-run", "--model", "tiny")
    assert capsys.readouterr().err.splitlines()[0].startswith("model: tiny")


def test_validate_shows_all_settings(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("train:\n  lr: 0.5\n")
    assert main(["validate", "--config", str(path)]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["train"]["lr"] == 0.5
    assert shown["quant"]["blocksize"] == 64


def test_validate_refuses_a_typo(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("train:\n  lrr: 0.5\n")
    assert "did you mean" in failing(capsys, main(["validate", "--config", str(path)]))


def test_doctor_says_that_all_is_well(capsys, monkeypatch):
    # with a GPU it misses the weights of the large model
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["problems"] == []
    assert "tiny" in facts["model"]
    assert main(["doctor"]) == 0
    assert "everything that a run needs is here" in capsys.readouterr().out


def test_a_preset_for_training_leaves_other_verbs_their_own_steps(monkeypatch, tmp_path, capsys):
    """`sd35_large_8gb` has 2,000 steps, which would be 20,000 pairs or a day of gradients."""
    requests = []
    monkeypatch.setattr(learn_subspace, "run", lambda request: requests.append(request) or FOUND)
    monkeypatch.setattr(vote, "run", lambda request: requests.append(request) or 1 / 0)
    preset, output = ["--config", "sd35_large_8gb"], str(tmp_path / "run")
    assert main(["subspace", "--output-dir", output, *preset]) == 0
    assert main(["subspace", "--output-dir", output, *preset, "train.max_steps=8"]) == 0
    assert "train.max_steps=2000" in capsys.readouterr().err
    for more in ([], ["--pairs", "50"]):
        with pytest.raises(ZeroDivisionError):
            main(["vote", "--run", output, *preset, *more])
    steps = [request.config.train.max_steps for request in requests]
    assert steps == [learn_subspace.SETTINGS["train"]["max_steps"], 8, 20, 5]
    assert all(request.config.data.resolution == 512 for request in requests)
    assert requests[-1].config.sample.every == 5
