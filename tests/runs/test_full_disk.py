"""A disk that fills up and folders that can't be written any more in the middle of a run: told,
nothing lost, and resume works.
"""

import contextlib
import errno
import os
import subprocess

import pytest

from qzo_diffusion.cli import main
from qzo_diffusion.core.errors import OutputError
from qzo_diffusion.core.journal import JournalWriter, read_journal
from qzo_diffusion.core.journal_format import StepEntry
from qzo_diffusion.runs import trainer as running
from qzo_diffusion.system.files import write_folder
from qzo_diffusion.train.checkpoint import list_checkpoints
from qzo_diffusion.train.tracking import Curves, MetricsLog
from tests.conftest import failing, metrics
from tests.runs.short_run import SETTINGS, assert_same_run


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MB, and a function that fills it but for some KB with one file, which it
    returns.
    """
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no file system may be mounted here: {mounted.stderr.decode().strip()}")

    def fill(leave_kb=0):
        filler = disk / "filler"
        size = 0
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                size += file.write(bytes(4096))
        os.truncate(filler, size - 1024 * leave_kb)
        return filler

    yield disk, fill
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def until_refused(write):
    """Call `write(n)` with n = 0, 1, ... until it raises OutputError.

    Returns that n and the error.
    """
    for count in range(10_000):
        try:
            write(count)
        except OutputError as error:
            return count, error
    raise AssertionError("the disk did not fill up")


def test_a_journal_on_a_full_disk_ends_with_its_last_whole_step_and_goes_on_later(small_disk):
    disk, fill = small_disk
    writer = JournalWriter.create(disk / "journal.qzo", {"directions": "rademacher"})
    filler = fill()
    count, error = until_refused(
        lambda step: writer.append(StepEntry(step, 0, 1e-3, 1e-2, 1.0, (0.5,)))
    )
    assert "No space left" in error.got
    journal = read_journal(disk / "journal.qzo")
    assert (journal.steps_done, journal.torn_bytes) == (count, 0)
    filler.unlink()
    writer.append(StepEntry(count, 0, 1e-3, 1e-2, 1.0, (0.5,)))
    writer.close()
    assert read_journal(disk / "journal.qzo").steps_done == count + 1


def test_a_journal_is_there_with_its_header_or_not_at_all(small_disk):
    disk, fill = small_disk
    filler = fill()
    with pytest.raises(OutputError, match="No space left"):
        JournalWriter.create(disk / "journal.qzo", {"directions": "rademacher"})
    assert [path.name for path in disk.iterdir()] == ["filler"]
    filler.unlink()
    JournalWriter.create(disk / "journal.qzo", {"directions": "rademacher"}).close()


def test_metrics_end_with_their_last_whole_line_and_curves_only_stop(small_disk):
    disk, fill = small_disk
    log, curves = MetricsLog(disk / "metrics.jsonl"), Curves(disk / "tensorboard")
    fill()
    count, error = until_refused(lambda step: log.write({"step": step}))
    assert "No space left" in error.got
    assert [line["step"] for line in metrics(disk)] == list(range(count))
    assert curves.problem is None
    for step in range(200):
        curves.add("train/loss", 1.0, step)
    assert "No space left" in curves.problem
    log.close()
    curves.close()


def test_a_folder_that_does_not_fit_leaves_the_one_before(small_disk):
    disk, fill = small_disk
    write_folder(disk / "final", lambda folder: (folder / "old").write_text("old"))
    filler = fill(leave_kb=8)
    with pytest.raises(OutputError, match="No space left"):
        write_folder(disk / "final", lambda folder: (folder / "new").write_bytes(bytes(100_000)))
    assert (disk / "final/old").read_text() == "old"
    assert sorted(path.name for path in disk.iterdir()) == ["filler", "final"]
    filler.unlink()


def at_step(monkeypatch, step, action):
    """Do something when the step was recorded."""
    original = running.Trainer.on_step

    def on_step(self, record):
        original(self, record)
        if record.step == step:
            action()

    monkeypatch.setattr(running.Trainer, "on_step", on_step)


def test_a_run_on_a_full_disk_says_so_keeps_its_state_and_goes_on_later(
    whole, train, small_disk, tmp_path, monkeypatch, capsys
):
    disk, fill = small_disk
    capsys.readouterr()
    with monkeypatch.context() as patch:
        at_step(patch, 3, fill)  # the checkpoint after this step finds no room
        error = failing(capsys, train(*SETTINGS, name="disk/run"))
    assert "checkpoints/step_000004 can't be written" in error
    assert "No space left" in error
    checkpoints, problems = list_checkpoints(disk / "run/checkpoints")
    assert ([checkpoint.step for checkpoint in checkpoints], problems) == ([2], [])
    assert read_journal(disk / "run/journal.qzo").steps_done == 4
    (disk / "filler").unlink()
    assert main(["train", "--resume", str(disk / "run")]) == 0
    assert_same_run(whole, disk / "run")


def test_a_folder_that_turns_into_a_file_is_told_and_the_run_goes_on_when_it_is_back(
    whole, train, tmp_path, monkeypatch, capsys
):
    checkpoints, moved = tmp_path / "run/checkpoints", tmp_path / "moved"

    def spoil():
        checkpoints.rename(moved)
        checkpoints.write_text("not a folder")

    capsys.readouterr()
    with monkeypatch.context() as patch:
        at_step(patch, 2, spoil)
        assert "checkpoints/step_000004 can't be written" in failing(capsys, train(*SETTINGS))
    assert read_journal(tmp_path / "run/journal.qzo").steps_done == 4
    checkpoints.unlink()
    moved.rename(checkpoints)
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert_same_run(whole, tmp_path / "run")


def test_samples_that_cannot_be_written_are_told_and_training_goes_on(
    train, tmp_path, monkeypatch, capsys
):
    samples = tmp_path / "run/samples"

    def spoil():
        samples.rename(tmp_path / "moved")
        samples.write_text("not a folder")

    at_step(monkeypatch, 1, spoil)
    assert train(*SETTINGS) == 0
    assert "warning: no samples at step 3" in capsys.readouterr().err
    assert read_journal(tmp_path / "run/journal.qzo").steps_done == 6


def test_a_journal_that_cannot_be_opened_for_writing_is_told(train, tmp_path, monkeypatch, capsys):
    assert train("--max-steps", 1) == 0
    capsys.readouterr()

    def refuse(path, flags, *rest):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("qzo_diffusion.core.journal.os.open", refuse)
        assert "journal.qzo can't be written: Permission denied" in failing(
            capsys, main(["train", "--resume", str(tmp_path / "run")])
        )
