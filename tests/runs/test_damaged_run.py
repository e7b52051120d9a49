"""A run whose checkpoints or journal are damaged goes on bit for bit, or is refused."""

import shutil

from qzo_diffusion.core.journal import read_journal
from qzo_diffusion.train.checkpoint import list_checkpoints
from tests.conftest import failing
from tests.runs.short_run import assert_same_run, load_equal, resume


def test_without_any_checkpoint_the_journal_rebuilds_the_run(whole, stopped):
    shutil.rmtree(stopped / "checkpoints")
    assert resume(stopped) == 0
    assert load_equal(whole, stopped)


def test_a_damaged_checkpoint_is_told_and_passed_over(whole, stopped, capsys):
    file = stopped / "checkpoints/step_000004/numbers.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    assert resume(stopped) == 0
    assert "a checkpoint is not used" in capsys.readouterr().err
    assert load_equal(whole, stopped)
    checkpoints, problems = list_checkpoints(stopped / "checkpoints")
    assert ([one.step for one in checkpoints], problems) == ([2, 4, 6], [])
    assert (stopped / "checkpoints/damaged_step_000004/numbers.safetensors").read_bytes() == data


def test_a_checkpoint_that_was_damaged_is_written_again(whole, stopped):
    """The run comes by there again when its journal ends before it."""
    (stopped / "checkpoints/step_000004/COMPLETE").unlink()
    journal = read_journal(stopped / "journal.qzo")
    path = stopped / "journal.qzo"
    path.write_bytes(path.read_bytes()[: journal.sizes[2]])  # three steps
    assert resume(stopped) == 0
    assert load_equal(whole, stopped)
    assert [one.step for one in list_checkpoints(stopped / "checkpoints")[0]] == [2, 4, 6]


def test_a_torn_journal_is_told_and_goes_on(whole, stopped, capsys):
    shutil.rmtree(stopped / "checkpoints")
    path = stopped / "journal.qzo"
    path.write_bytes(path.read_bytes()[:-3])
    assert resume(stopped) == 0
    assert "cut off" in capsys.readouterr().err
    assert_same_run(whole, stopped)


def test_a_damaged_journal_is_refused_and_nothing_is_touched(stopped, capsys):
    path = stopped / "journal.qzo"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    before = {file: file.read_bytes() for file in stopped.rglob("*") if file.is_file()}
    capsys.readouterr()
    assert "damaged" in failing(capsys, resume(stopped))
    assert before == {file: file.read_bytes() for file in stopped.rglob("*") if file.is_file()}


def test_a_journal_shorter_than_its_checkpoint_is_refused(stopped, capsys):
    path = stopped / "journal.qzo"
    path.write_bytes(path.read_bytes()[: read_journal(path).sizes[0]])
    capsys.readouterr()
    assert "ends at step 1" in failing(capsys, resume(stopped))
