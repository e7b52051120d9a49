"""Every method on a tiny Llama: the files of its run, its resume, its replay, its evaluation."""

import contextlib
import functools
import io
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qzo_diffusion.cli import main
from qzo_diffusion.config.files import make_config
from qzo_diffusion.config.llm import LlmConfig
from qzo_diffusion.core.errors import ConfigError
from qzo_diffusion.runs import report, trainer
from qzo_diffusion.runs.llm.methods import load_base
from tests.conftest import failing, killed_after, metrics
from tests.runs.llm.short_run import METHODS, STEPS, assert_same_weights, command_line


@dataclass
class Ended:
    """A run that is over: its folder, its results and what it said. Tests only read it."""

    folder: Path
    results: dict
    said: str


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model, data):
    """The run of a method with its page, made at the first call."""
    root = tmp_path_factory.mktemp("whole")

    @functools.cache
    def of(method):
        out, err = io.StringIO(), io.StringIO()
        command = command_line(root / method, model, data, "--method", method, "--json")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "report_run", report)
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                assert main(command) == 0
        return Ended(root / method, json.loads(out.getvalue()), err.getvalue())

    return of


@pytest.mark.parametrize("method", METHODS)
def test_every_method_leaves_a_whole_run(whole, method):
    run, results = whole(method).folder, whole(method).results
    assert results["steps"] == STEPS
    assert "warning: no report" not in whole(method).said
    assert "Accuracy on" in (run / "report.html").read_text()
    assert results["accuracy"].keys() == {"start", "end"}
    assert {
        "config.yaml",
        "environment.json",
        "dataset.json",
        "metrics.jsonl",
        "evaluation.json",
        "final",
        "checkpoints",
    } <= {path.name for path in run.iterdir()}
    assert (run / "journal.qzo").exists() == (method not in ("qlora", "fo-scales"))
    assert len(json.loads((run / "dataset.json").read_text())) == 16 + 8 + 12
    lines = metrics(run)
    assert [line["step"] for line in lines if "validation_loss" in line] == [0, 2, 4, 6]
    stored = torch.int8 if method == "quzo" else torch.float32
    assert all(
        tensor.dtype == stored
        for tensor in load_file(run / "final" / "scales.safetensors").values()
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_killed_goes_on_bit_for_bit(arguments, tmp_path, monkeypatch, whole, method):
    more = ["--method", method] + (["train.optimizer=adam"] if method == "qzo" else [])
    if method == "qzo":
        assert main(arguments(*more, name="whole")) == 0
        ended = tmp_path / "whole"
    else:
        ended = whole(method).folder
    with monkeypatch.context() as patched:
        killed_after(patched, 5)
        assert main(arguments(*more, name="killed")) == 130
    assert main(arguments("--resume", tmp_path / "killed", name="killed")) == 0
    assert_same_weights(ended, tmp_path / "killed")
    assert metrics(ended) == metrics(tmp_path / "killed")
    read = [
        json.loads((folder / "evaluation.json").read_text())
        for folder in (ended, tmp_path / "killed")
    ]
    assert read[0] == read[1]


@pytest.mark.parametrize("method", ["qzo", "fo-scales"])
def test_with_three_bits_a_number_it_goes_on_bit_for_bit(arguments, tmp_path, monkeypatch, method):
    more = ["--method", method, "train.state_bits=3", "qzo.layers=null"]
    more += ["train.optimizer=adam"] if method == "qzo" else []
    assert main(arguments(*more, name="whole")) == 0
    with monkeypatch.context() as patched:
        killed_after(patched, 5)
        assert main(arguments(*more, name="killed")) == 130
    assert main(arguments("--resume", tmp_path / "killed", name="killed")) == 0
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")
    newest = max((tmp_path / "whole" / "checkpoints").iterdir())
    state = load_file(newest / "optimizer.safetensors")
    assert any(name.startswith("second_blocks.") for name in state)


@pytest.mark.parametrize("method", ["mezo", "quzo-lora", "qlora"])
def test_what_is_trained_is_what_the_moved_model_has(model, monkeypatch, method):
    """To move a model gives its parameters new memory, also where a CPU is all there is to move
    to.
    """
    original = torch.nn.Module.to

    def to(self, *place, **options):
        for parameter in self.parameters():
            parameter.data = parameter.data.clone()
        return original(self, *place, **options)

    monkeypatch.setattr(torch.nn.Module, "to", to)
    base = load_base(
        make_config({"method": method}, LlmConfig), model, torch.device("cpu"), torch.float32
    )
    theta = base.theta.templates()
    assert theta
    for name, number in theta.items():
        assert number.data_ptr() == base.lm.model.get_submodule(name).weight.data_ptr(), name


@pytest.mark.parametrize("method", METHODS)
def test_training_lowers_the_loss_and_evaluate_finds_the_same_model(
    arguments, tmp_path, capsys, method
):
    """Twelve sentences that are told apart by one word: a few steps at a high rate suffice for each
    method.
    """
    rate = {
        "qzo": 0.1,
        "mezo": 1e-3,
        "quzo": 0.1,
        "quzo-lora": 1e-3,
        "qlora": 1e-2,
        "fo-scales": 3e-2,
    }[method]
    assert (
        main(
            arguments(
                "--method",
                method,
                f"train.lr={rate}",
                "--max-steps",
                60 if method == "quzo-lora" else 30,
                "train.validate_every=0",
                "--json",
            )
        )
        == 0
    )
    results = json.loads(capsys.readouterr().out)
    assert results["validation_loss"]["end"] < results["validation_loss"]["start"]
    assert main(["llm", "evaluate", "--run", str(tmp_path / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"] == results["accuracy"]["end"]
    assert found["method"] == method
    assert (
        main(["llm", "evaluate", "--config", str(tmp_path / "run" / "config.yaml"), "--json"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["accuracy"] == results["accuracy"]["start"]


@pytest.mark.parametrize("method", ["mezo", "qlora", "quzo-lora"])
def test_methods_that_train_no_scales_take_the_chosen_layers(model, method):
    def trained(**qzo):
        config = make_config({"method": method, "qzo": qzo}, LlmConfig)
        return set(load_base(config, model, torch.device("cpu"), torch.float32).theta.templates())

    assert len(trained()) == 14 * (1 if method == "mezo" else 2)
    assert {name.split(".lora")[0] for name in trained(layers=["layers.1.mlp"])} == {
        f"model.layers.1.mlp.{kind}_proj" for kind in ("gate", "up", "down")
    }
    with pytest.raises(ConfigError, match="no such layer"):
        trained(layers=["nothing"])


@pytest.mark.parametrize("method", ["qzo", "mezo", "quzo", "quzo-lora"])
def test_a_journal_alone_rebuilds_the_run(whole, tmp_path, capsys, method):
    trained = whole(method).results
    journal = str(whole(method).folder / "journal.qzo")
    assert main(["replay", "--journal", journal, "--output-dir", str(tmp_path / "again")]) == 0
    assert_same_weights(whole(method).folder, tmp_path / "again")
    assert main(["llm", "evaluate", "--run", str(tmp_path / "again"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == trained["accuracy"]["end"]


def test_a_run_of_another_method_is_not_applied(arguments, tmp_path, capsys):
    assert main(arguments("--method", "qlora", "--max-steps", 1)) == 0
    code = main(["llm", "evaluate", "--run", str(tmp_path / "run"), "--method", "qzo"])
    assert "by qlora" in failing(capsys, code)
