"""Runs on a tiny Llama: objectives, files of examples, batches, and hidden states that are kept."""

import json

import pytest
import torch
from safetensors.torch import load_file

from qzo_diffusion.cli import main
from qzo_diffusion.config.files import make_config
from qzo_diffusion.config.llm import LlmConfig
from qzo_diffusion.core.journal import read_journal
from qzo_diffusion.runs.llm.plan import make_plan
from tests.conftest import killed_after, metrics
from tests.runs.llm.short_run import SECOND_BLOCK
from tests.tiny_llama import write_sentences


def test_what_is_kept_is_made_again_on_resume_bit_for_bit(arguments, tmp_path, monkeypatch):
    assert main(arguments(SECOND_BLOCK, name="whole")) == 0
    with monkeypatch.context() as patched:
        killed_after(patched, 3)
        assert main(arguments(SECOND_BLOCK, name="killed")) == 130
    assert main(arguments("--resume", tmp_path / "killed", name="killed")) == 0
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "killed")
    assert main(arguments(SECOND_BLOCK, "data.keep_hidden=false", name="not_kept")) == 0
    whole, other = (
        metrics(tmp_path / name)[-1]["validation_loss"] for name in ("whole", "not_kept")
    )
    assert whole == pytest.approx(other, rel=1e-3)


def test_every_example_can_have_several_directions(arguments, tmp_path):
    more = ["qzo.num_directions=3", "qzo.per_example=true", "qzo.normalize=true"]
    assert main(arguments(*more)) == 0
    steps = read_journal(tmp_path / "run" / "journal.qzo").steps
    assert {len(step.projected_grad) for step in steps} == {12}
    assert (
        main(
            [
                "replay",
                "--journal",
                str(tmp_path / "run" / "journal.qzo"),
                "--output-dir",
                str(tmp_path / "replayed"),
            ]
        )
        == 0
    )
    trained, replayed = (
        load_file(tmp_path / name / "final" / "scales.safetensors") for name in ("run", "replayed")
    )
    assert all(torch.equal(tensor, replayed[name]) for name, tensor in trained.items())


def test_the_base_is_evaluated_by_name(model, data, capsys):
    assert (
        main(["llm", "evaluate", "--task", "sst2", "--model", str(model), "--data-dir", str(data)])
        == 0
    )
    assert "on 12 examples of sst2" in capsys.readouterr().err


def test_accuracy_itself_can_be_the_objective(arguments, tmp_path):
    assert main(arguments("--objective", "accuracy")) == 0
    count = len(read_journal(tmp_path / "run" / "journal.qzo").steps[0].projected_grad)
    wrong = [line["loss_plus"] * count for line in metrics(tmp_path / "run") if "loss" in line]
    assert wrong == pytest.approx([round(one) for one in wrong])  # answers are right or wrong


def test_generated_text_is_tuned_by_its_f1(tmp_path, model, capsys):
    facts = [
        {
            "title": "t",
            "context": f"film {n}",
            "question": "which",
            "answers": [" red", "green film"],
        }
        for n in range(12)
    ]
    for name in ("train.json", "dev.json"):
        (tmp_path / name).write_text(json.dumps(facts))
    base = [
        "llm",
        "train",
        "--task",
        "squad",
        "--model",
        str(model),
        "--data-dir",
        str(tmp_path),
        "--objective",
        "f1",
        "--json",
    ]
    small = [
        "--max-steps",
        "2",
        "data.batch_size=3",
        "data.validation_examples=2",
        "data.train_examples=6",
    ]
    assert main([*base, *small, "--output-dir", str(tmp_path / "run")]) == 0
    assert 0 <= json.loads(capsys.readouterr().out)["f1"]["end"] <= 1


def test_a_dry_run_shows_what_the_model_will_read(arguments, tmp_path, capsys):
    assert main(arguments("--dry-run", "data.batch_size=2")) == 0
    shown = capsys.readouterr().out
    assert "16 to train on, 8 held out, 12 to test on" in shown
    assert "It was" in shown
    assert "a step    2 examples, 8 directions of each: 16 forward passes" in shown
    assert "layers: quiet" in shown
    assert not (tmp_path / "run").exists()


def test_micro_batches_change_nothing_but_rounding(arguments, tmp_path):
    assert main(arguments(name="one")) == 0
    assert main(arguments("train.micro_batch_size=2", name="two")) == 0
    one, two = (
        load_file(tmp_path / name / "final" / "scales.safetensors") for name in ("one", "two")
    )
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-4, atol=0)


def test_one_file_for_both_parts_is_drawn_disjointly(arguments, tmp_path):
    files = [
        "data.train_file=train.tsv",
        "data.test_file=train.tsv",
        "data.test_examples=4",
        "data.train_examples=12",
    ]
    assert main(arguments(*files)) == 0
    rows = json.loads((tmp_path / "run" / "dataset.json").read_text())
    assert len({row["file"] for row in rows}) == len(rows) == 24


@pytest.mark.parametrize("how", ["./train.tsv", "../{}/train.tsv", "{}/train.tsv", "link.tsv"])
def test_one_file_is_one_file_however_it_is_written(model, tmp_path, how):
    data = write_sentences(tmp_path / "here")
    (data / "link.tsv").symlink_to("train.tsv")
    names = {
        "train_file": "train.tsv",
        "test_file": how.format(data.name if how.startswith("..") else data),
    }
    counts = {"train_examples": 12, "validation_examples": 8, "test_examples": 4}
    config = make_config(
        {"model": str(model), "data": {"dir": str(data), **names, **counts}}, LlmConfig
    )
    splits = make_plan(config).splits
    assert (
        len({one.prompt for part in (splits.train, splits.validation, splits.test) for one in part})
        == 24
    )


def test_a_cache_that_cannot_be_written_costs_time_alone(arguments, tmp_path, monkeypatch):
    def refused(**_):
        raise OSError(30, "Read-only file system")

    assert main(arguments(SECOND_BLOCK, "data.keep_hidden=false", name="not_kept")) == 0
    monkeypatch.setattr("qzo_diffusion.llm.kept_hidden.tempfile.TemporaryFile", refused)
    assert main(arguments(SECOND_BLOCK, name="refused")) == 0
    assert metrics(tmp_path / "refused") == metrics(tmp_path / "not_kept")


def test_a_mean_loss_has_no_interval(tmp_path, model, data, capsys):
    task = tmp_path / "sentences.yaml"
    columns = (
        "train: [train.tsv]\ntest: [dev.tsv]\ncolumns: [sentence, label]\ntemplate: "
        '"{sentence}"\nmetric: loss\n'
    )
    task.write_text(f"name: sentences\n{columns}")
    command = [
        "llm",
        "train",
        "--task",
        task,
        "--model",
        model,
        "--data-dir",
        data,
        "--output-dir",
        tmp_path / "run",
    ]
    small = ["--max-steps", "2", "data.train_examples=12", "data.validation_examples=4"]
    assert main([*map(str, command), *small, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["loss"]["start"] > 1  # of which no share's interval could be taken
    assert "ci95" not in results
    assert main(["llm", "evaluate", "--run", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().err
    assert "on 12 examples of sentences" in said
    assert "±" not in said
