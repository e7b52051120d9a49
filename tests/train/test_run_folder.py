"""Files of a run: whole or not at all, and never over another run."""

import json
import math
import os
from pathlib import Path

import pytest
import torch

from qzo_diffusion.core.errors import OutputError
from qzo_diffusion.core.spsa import Estimate
from qzo_diffusion.runs.tuned import load_scales
from qzo_diffusion.system.files import COMPLETE, check_folder, check_new, prepare_file, write_folder
from qzo_diffusion.train.loop import StepRecord
from qzo_diffusion.train.run_folder import RunFolder
from qzo_diffusion.train.tracking import MetricsLog, Tracker

SCALES = {"block.0": torch.arange(4.0), "block.1": torch.ones(2)}


def record(step=0, loss=1.0, clipped=False):
    found = Estimate((), (loss,), (loss,), (0.5,), (0.5,), (clipped,))
    return StepRecord(step, found, 1e-3, 1e-2, 0.5, 0.1)


def test_scales_come_back_with_their_metadata(tmp_path):
    out = RunFolder.create(tmp_path / "run")
    out.save_scales("final", SCALES, {"qzo.codes": "abc"})
    for source in (
        tmp_path / "run",
        tmp_path / "run" / "final",
        tmp_path / "run" / "final" / "scales.safetensors",
    ):
        tensors, facts = load_scales(source)
        assert facts["qzo.codes"] == "abc"
        assert all(torch.equal(tensors[name], SCALES[name]) for name in SCALES)


def test_no_partial_files_are_left(tmp_path):
    out = RunFolder.create(tmp_path / "run")
    out.save_scales("final", SCALES, {})
    out.write_json("dataset.json", [])
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("error", [OSError("busy"), KeyboardInterrupt()])
def test_what_was_there_comes_back_where_the_new_folder_cannot_take_its_place(
    tmp_path, monkeypatch, error
):
    target = write_folder(tmp_path / "final", lambda folder: (folder / "a").write_text("old"))
    replace = os.replace

    def refused(source, place):
        if Path(source).name == ".final.partial":
            raise error
        replace(source, place)

    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises((OutputError, KeyboardInterrupt)):
        write_folder(target, lambda folder: (folder / "a").write_text("new"))
    assert (target / "a").read_text() == "old"
    check_folder(target)
    assert not (tmp_path / ".final.old").exists()


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_all_files_have_the_mode_of_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        out = RunFolder.create(tmp_path / "run")
        out.save_scales("final", SCALES, {})
        out.write_json("dataset.json", [])
    finally:
        os.umask(before)
    modes = {file.stat().st_mode & 0o777 for file in out.path.rglob("*") if file.is_file()}
    assert modes == {0o666 & ~mask}


def test_an_existing_run_is_not_overwritten(tmp_path):
    RunFolder.create(tmp_path / "run").write_text("config.yaml", "a: 1\n")
    with pytest.raises(OutputError, match="never overwritten"):
        RunFolder.create(tmp_path / "run")
    assert (tmp_path / "run" / "config.yaml").read_text() == "a: 1\n"


def test_what_to_do_about_it_is_the_caller_s_to_say(tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(OutputError, match="remedy: take another"):
        RunFolder.create(tmp_path, "take another")


def test_the_current_folder_takes_a_run_but_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (Path(), tmp_path):
        with pytest.raises(OutputError, match="is the current folder"):
            check_new(path)
    RunFolder.create(Path())


def test_names_are_found_from_inside(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    write_folder(Path(), lambda folder: (folder / "file").write_text(""))
    assert sorted(file.name for file in (tmp_path / "sub").iterdir()) == [COMPLETE, "file"]
    with pytest.raises(OutputError, match="can't be written"):
        RunFolder(tmp_path).write_text("sub/.", "")


def test_a_file_s_folder_is_made_before_the_work(tmp_path):
    prepare_file(tmp_path / "a" / "b" / "scores.json")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "scores.json", tmp_path / "a"):
        with pytest.raises(OutputError, match="choose another --output"):
            prepare_file(path)


def test_files_of_file_managers_and_hubs_harm_nothing(tmp_path):
    def write(folder):
        (folder / "scales.safetensors").write_bytes(b"")
        (folder / ".gitattributes").write_text("one")  # as copied from a model's folder

    folder = RunFolder.create(tmp_path / "run").save_scales("final", SCALES, {})
    (folder / ".DS_Store").write_text("")
    (folder / ".cache").mkdir()
    assert load_scales(tmp_path / "run")[0].keys() == SCALES.keys()
    folder = write_folder(tmp_path / "copied", write)
    (folder / ".gitattributes").write_text("another")
    check_folder(folder)
    marker = json.loads((folder / COMPLETE).read_text())
    (folder / COMPLETE).write_text(
        json.dumps(marker | {".gitattributes": "hash of an earlier version"})
    )
    check_folder(folder)
    (folder / "visible").write_text("")
    with pytest.raises(OutputError, match="other files"):
        check_folder(folder)


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


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"\xff" * len(data)],
)
def test_damaged_scales_are_refused(tmp_path, damage):
    file = (
        RunFolder.create(tmp_path / "run").save_scales("final", SCALES, {}) / "scales.safetensors"
    )
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
    assert json.loads(line, parse_constant=lambda name: pytest.fail(name)) == {
        "loss": "nan",
        "d": ["inf", 1.0],
    }


def test_tracker_appends_a_line_a_step_at_once_and_curves(tmp_path, capsys):
    tracker = Tracker(tmp_path, total_steps=3)
    tracker.on_step(record(0, 1.0, clipped=True))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    tracker.on_validation(1, 0.25)
    tracker.on_step(record(1, math.nan))
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
    tracker.report("something")
    tracker.close()
    assert capsys.readouterr().err == ""
