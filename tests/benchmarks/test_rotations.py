"""The benchmark of rotated weights: its text, its perplexity and its figures, by hand."""

import argparse
import json
import math

import pytest
import torch

from benchmarks import rotations
from tests.tiny_llama import save_tiny_llama, tiny_llama


def test_perplexity_is_that_of_the_whole_logits(monkeypatch):
    monkeypatch.setattr(rotations, "WINDOW", 8)
    lm, text = tiny_llama(), "It was a good film and a bad answer. " * 3
    ids = torch.tensor(lm.encode(text)[:16]).view(2, 8)
    with torch.no_grad():
        logs = lm.model(input_ids=ids).logits.log_softmax(-1)
    losses = [-logs[row, at, ids[row, at + 1]].item() for row in range(2) for at in range(7)]
    found = rotations.perplexity(lm, text, 2)
    assert found == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)


def test_every_width_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(rotations, "WINDOW", 16)
    model = save_tiny_llama(tmp_path / "model")
    articles = [{"paragraphs": [{"context": "It was a good film. " * 9}]}]
    (tmp_path / "xquad.en.json").write_text(json.dumps({"data": articles}))
    options = argparse.Namespace(
        data=tmp_path, model=model, cache=tmp_path, windows=2, dtype="bfloat16"
    )
    rounded, plain = (rotations.VERBS[width]("hadamard", options) for width in rotations.INPUTS)
    assert rounded != plain


def test_figures_hold_the_rows_that_are_finished():
    cells = {
        "hadamard": {"w4a16": 2.0, "w4a4": 3.0},
        "none": {"w4a16": 2.0, "w4a4": 9.0, "sst2": {"steps": 5}},
        "kurtail": {"sst2": {}},
    }
    found = rotations.figures({}, cells)
    assert found["perplexity_w4a4"] == {"none": 9.0, "hadamard": 3.0}
    assert list(found["rotations"]) == ["none", "hadamard", "kurtail"]


def test_figures_that_were_recorded_stay():
    recorded = {"none": {"w4a16": 2.0, "w4a4": 9.0}, "kurtail": {"w4a4": 4.0}}
    found = rotations.figures(recorded, {"none": {"w4a4": 8.0, "sst2": {"steps": 5}}})
    assert found["perplexity_w4a4"] == {"none": 8.0, "kurtail": 4.0}
    assert found["rotations"]["none"] == {"w4a16": 2.0, "w4a4": 8.0, "sst2": {"steps": 5}}


def test_the_calibration_text_is_of_passages(tmp_path):
    folder = tmp_path / "superglue_BoolQ"
    folder.mkdir()
    lines = [json.dumps({"passage": f"passage {index}"}) for index in range(3)]
    (folder / "val.jsonl").write_text("\n".join(lines))
    rotations.write_calibration(tmp_path, tmp_path / "cache")
    file = tmp_path / "cache" / "calibration.txt"
    assert file.read_text() == "passage 0\n\npassage 1\n\npassage 2"
    settings = rotations.quant("kurtail", "w4a4", tmp_path / "cache")
    assert settings["calibration"] == str(file)
    assert "calibration" not in rotations.quant("hadamard", "w4a4", tmp_path / "cache")
