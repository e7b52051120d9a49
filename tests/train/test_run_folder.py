"""Files of a run: whole or not at all, and never over another run."""

import json
import math

import pytest
import torch

from qzo_diffusion.core.errors import OutputError
from qzo_diffusion.train.loop import StepRecord
from qzo_diffusion.train.run_folder import COMPLETE, RunFolder, load_scales
from qzo_diffusion.train.tracking import MetricsLog, Tracker

SCALES = {"block.0": torch.arange(4.0), "block.1": torch.ones(2)}


def record(step=0, loss=1.0, skipped=False, clipped=False):
    return StepRecord(step, loss, loss, loss, 0.5, 0.5, 1e-3, 1e-2, clipped, skipped, 0.5, 0.1)


def test_scales_come_back_with_their_metadata(tmp_path):
    out = RunFolder.create(tmp_path / "run")
    out.save_scales("final", SCALES, {"qzo.codes": "abc"})
    for source in (tmp_path / "run", tmp_path / "run" / "final", tmp_path / "run" / "final" / "scales.safetensors"):
        tensors, facts = load_scales(source)
        assert facts["qzo.codes"] == "abc"
        assert all(torch.equal(tensors[name], SCALES[name]) for name in SCALES)


def test_no_partial_files_are_left(tmp_path):
    out = RunFolder.create(tmp_path / "run")
    out.save_scales("final", SCALES, {})
    out.write_json("dataset.json", [])
    assert not list(tmp_path.rglob("*.partial"))


def test_an_existing_run_is_not_overwritten(tmp_path):
    RunFolder.create(tmp_path / "run").write_text("config.yaml", "a: 1\n")
    with pytest.raises(OutputError, match="never overwritten"):
        RunFolder.create(tmp_path / "run")
    assert (tmp_path / "run" / "config.yaml").read_text() == "a: 1\n"


def test_an_empty_folder_may_be_used(tmp_path):
    (tmp_path / "run").mkdir()
    RunFolder.create(tmp_path / "run")


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="can't be written"):
        RunFolder.create(tmp_path / "file" / "run")


def test_unfinished_scales_are_refused(tmp_path):
    folder = RunFolder.create(tmp_path / "run").save_scales("final", SCALES, {})
    (folder / COMPLETE).unlink()
    with pytest.raises(OutputError, match="not written to its end"):
        load_scales(tmp_path / "run")


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"\xff" * len(data)])
def test_damaged_scales_are_refused(tmp_path, damage):
    file = RunFolder.create(tmp_path / "run").save_scales("final", SCALES, {}) / "scales.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(OutputError, match="damaged"):
        load_scales(tmp_path / "run")


def test_a_folder_without_scales_is_refused(tmp_path):
    with pytest.raises(OutputError, match="no tuned scales"):
        load_scales(tmp_path)


def test_metrics_are_strict_json_also_when_a_loss_is_not_finite(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write({"loss": math.nan, "d": [math.inf, 1.0]})
    log.close()
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=lambda name: pytest.fail(name)) == {"loss": "nan", "d": ["inf", 1.0]}


def test_tracker_appends_a_line_a_step_at_once_and_curves(tmp_path, capsys):
    tracker = Tracker(tmp_path, total_steps=3)
    tracker.on_step(record(0, 1.0, clipped=True))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    tracker.on_validation(1, 0.25)
    tracker.on_step(record(1, math.nan, skipped=True))
    tracker.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["step"] == 0
    assert lines[1] == {"step": 1, "validation_loss": 0.25}
    assert lines[2]["skipped"] is True
    assert list((tmp_path / "tensorboard").iterdir())
    shown = capsys.readouterr().err
    assert "held-out loss 0.2500" in shown
    assert "clipped 50%" in shown
    assert "skipped 1" in shown


def test_tracker_without_progress_says_nothing(tmp_path, capsys):
    tracker = Tracker(tmp_path, total_steps=1, show_progress=False)
    tracker.on_step(record())
    tracker.say("something")
    tracker.close()
    assert capsys.readouterr().err == ""
