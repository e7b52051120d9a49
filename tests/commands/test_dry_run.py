"""`train --dry-run`, `validate` and `doctor`: they tell, and train nothing."""

import json

import pytest
import torch
import yaml

from qzo_diffusion.cli import main
from tests.conftest import failing


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
