"""Runs that end by `train.patience` or `train.max_minutes`: at which step, with which result, and
how they go on.
"""

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch

from qzo_diffusion.cli import main
from qzo_diffusion.core.journal import read_journal
from qzo_diffusion.runs.trainer import Trainer
from qzo_diffusion.runs.tuned import load_scales
from tests.conftest import failing, metrics
from tests.forked import MOST_SECONDS, end_all, started_ranks
from tests.runs.llm.short_run import command_line
from tests.runs.short_run import assert_same_run, in_parts, load_equal, resume
from tests.tiny_llama import save_tiny_llama, write_sentences

# the held-out loss after each step, in place of the one that would be measured
LOSSES = [9.0, 5.0, 4.0, 6.0, 7.0, 4.0, 3.0, 8.0]
PATIENCE = [
    "--max-steps",
    7,
    "train.patience=3",
    "train.validate_every=1",
    "train.checkpoint_every=0",
    "train.keep_checkpoints=1",
    "train.schedule=constant",
    "train.lr=0.05",
]
BEST, LAST = 2, 5


def scripted(losses):
    def validate(self, step):
        if step not in self.validation:
            self.validation[step] = losses[step]
            self.tracker.on_validation(step, losses[step])

    return validate


@pytest.fixture(autouse=True)
def _losses(monkeypatch):
    monkeypatch.setattr(Trainer, "validate", scripted(LOSSES))


@pytest.fixture
def settings(held_out):
    return [*PATIENCE, "--validation-dir", held_out]


def steps_of(run):
    return [line["step"] for line in metrics(run) if "loss" in line]


def result_of(run):
    return int(load_scales(run)[1]["qzo.steps"])


@pytest.mark.usefixtures("pages")
def test_the_best_step_becomes_the_result(train, settings, tmp_path, capsys):
    assert train(*settings, "--json") == 0
    run, said = tmp_path / "run", capsys.readouterr()
    assert steps_of(run) == list(range(LAST))
    assert metrics(run)[-1] == {"step": LAST, "final_step": BEST}
    assert result_of(run) == BEST
    results = json.loads(said.out)
    assert (results["ended_by"], results["final_step"]) == ("patience", BEST)
    assert results["validation_loss"] == {"start": LOSSES[0], "end": LOSSES[BEST]}
    assert results["stopped"] is False
    page = (run / "report.html").read_text()
    assert f"Finished at step {LAST}; the result is step {BEST}, of the lowest" in page
    assert train(*settings, "--max-steps", BEST, "train.patience=null", name="short") == 0
    assert load_equal(run, tmp_path / "short")


def test_the_last_words_say_why_and_where(train, settings, capsys):
    assert train(*settings) == 0
    said = capsys.readouterr()
    words = said.out + said.err
    assert f"at step {LAST} of 7, by train.patience" in words
    assert f"step {BEST}, of the lowest held-out loss" in words
    assert "9.0000 -> 4.0000" in words


@pytest.mark.parametrize("step", [0, 1, 3])
@pytest.mark.parametrize("method", ["qzo", "fo-scales"])
def test_an_interrupted_run_ends_at_the_same_step(
    train, settings, tmp_path, monkeypatch, step, method
):
    settings = [*settings, f"method={method}"]
    assert train(*settings, name="whole") == 0
    parts = in_parts(train, tmp_path, monkeypatch, *settings, after=step)
    whole = tmp_path / "whole"
    assert result_of(whole) == result_of(parts) == BEST
    if method == "qzo":
        assert_same_run(whole, parts)
    else:
        assert metrics(whole) == metrics(parts)
        assert load_equal(whole, parts)


def test_a_run_that_ended_by_patience_goes_on_with_more_of_it(train, settings, tmp_path):
    assert train(*settings) == 0
    run = tmp_path / "run"
    assert resume(run) == 0
    assert (steps_of(run), result_of(run)) == (list(range(LAST)), BEST)
    assert resume(run, "train.patience=4") == 0
    assert (steps_of(run), result_of(run)) == (list(range(7)), 6)
    assert train(*settings, "train.patience=4", name="whole") == 0
    assert load_equal(run, tmp_path / "whole")
    assert metrics(run) == metrics(tmp_path / "whole")


def test_the_result_may_be_the_step_before_the_first(train, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "validate", scripted([1.0, 2.0, 2.0, 2.0]))
    assert train(*settings) == 0
    assert train(*settings, "--max-steps", 0, "train.patience=null", name="base") == 0
    assert steps_of(tmp_path / "run") == [0, 1, 2]
    assert load_equal(tmp_path / "run", tmp_path / "base")


def test_a_lost_checkpoint_is_told_and_the_last_step_is_the_result(
    train, settings, tmp_path, monkeypatch, capsys
):
    on_step = Trainer.on_step

    def on_last_step(self, record):
        on_step(self, record)
        if record.step + 1 == LAST:
            shutil.rmtree(tmp_path / f"run/checkpoints/step_{BEST:06d}")

    monkeypatch.setattr(Trainer, "on_step", on_last_step)
    assert train(*settings) == 0
    assert "final/ holds the last step, not the best" in capsys.readouterr().err
    assert result_of(tmp_path / "run") == LAST


def test_time_ends_a_run_as_its_last_step_does_and_it_goes_on(
    train, held_out, tmp_path, monkeypatch, capsys
):
    settings = ["--max-steps", 6, "--validation-dir", held_out, "train.lr=0.05", "sample.every=3"]
    assert train(*settings, name="whole") == 0
    on_step = Trainer.on_step

    def on_third_step(self, record):
        on_step(self, record)
        if record.step == 2:
            self.limits = replace(self.limits, deadline=0.0)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "on_step", on_third_step)
        capsys.readouterr()
        assert train(*settings, "train.max_minutes=60", name="parts") == 0
    parts, said = tmp_path / "parts", capsys.readouterr()
    assert "at step 3 of 6, by train.max_minutes; --resume goes on" in said.out + said.err
    assert result_of(parts) == 3
    assert metrics(parts)[-1] == {"step": 3, "final_step": 3}
    assert resume(parts, "train.max_minutes=30") == 0
    assert result_of(parts) == 6
    assert load_equal(parts, tmp_path / "whole")


def test_no_time_at_all_leaves_the_base(train, tmp_path):
    assert train("--max-steps", 2, "train.max_minutes=1e-6") == 0
    assert steps_of(tmp_path / "run") == []
    assert result_of(tmp_path / "run") == 0


def main_with_losses(arguments):
    Trainer.validate = scripted(LOSSES)
    sys.exit(main(arguments))


def test_ranks_end_at_the_same_step(train_arguments, settings, tmp_path):
    command = train_arguments(*settings, name="two")
    processes = started_ranks([(main_with_losses, command)] * 2)
    try:
        ended = [one.wait(MOST_SECONDS) for one in processes]
    finally:
        end_all(processes)
    assert [code for code, _ in ended] == [0, 0], ended
    run = tmp_path / "two"
    assert read_journal(run / "journal.qzo").steps_done == LAST
    assert result_of(run) == BEST


def test_a_language_model_ends_by_patience(tmp_path):
    model, data = save_tiny_llama(tmp_path / "model"), write_sentences(tmp_path / "data")
    command = command_line(tmp_path / "run", model, data, *PATIENCE, "--json")
    assert main([one for one in command if one != "train.validate_every=2"]) == 0
    assert steps_of(tmp_path / "run") == list(range(LAST))
    scores = json.loads((tmp_path / "run" / "evaluation.json").read_text())["by_step"]
    assert list(scores) == ["0", str(BEST)]
    tuned, best = (
        load_scales(tmp_path / "run" / place)[0]
        for place in ("final", f"checkpoints/step_00000{BEST}")
    )
    assert all(torch.equal(tuned[name], best[name]) for name in tuned)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["train.patience=0"], ["train.patience", "0"]),
        (["train.patience=2", "train.validate_every=0"], ["train", "validate_every: 1 or more"]),
        (["train.patience=2", "train.validate_every=1"], ["train.patience=2", "held out"]),
        (["train.max_minutes=0"], ["train.max_minutes", "0"]),
        (["train.max_minutes=.inf"], ["train.max_minutes", "finite"]),
        (["train.early_stopping=3"], ["did you mean 'train.patience'"]),
    ],
)
def test_limits_that_can_not_be_are_refused(train, tmp_path, capsys, wrong, words):
    error = failing(capsys, train("--max-steps", 1, *wrong))
    for word in words:
        assert word in error
    assert not (tmp_path / "run").exists()
