"""A run goes on with more or fewer steps exactly where a whole run would have had its rates."""

import pytest

from qzo_diffusion.config.files import changed_settings, make_config
from qzo_diffusion.config.style import Config
from qzo_diffusion.core.errors import ConfigError
from qzo_diffusion.core.journal import JournalWriter
from qzo_diffusion.core.journal_format import StepEntry
from qzo_diffusion.core.optimizer import make_schedule
from qzo_diffusion.runs.longer import agree_until, steps_done, without_steps
from tests.conftest import failing
from tests.runs.short_run import SETTINGS, load_equal, resume


def settings(schedule, steps, **train):
    return make_config({"train": {"schedule": schedule, "lr": 0.1, "max_steps": steps} | train})


@pytest.mark.parametrize(
    ("schedule", "steps", "done", "wanted"),
    [
        ("constant", 1000, 1000, 2000),
        ("constant", 1000, 300, 500),
        ("inverse_sqrt", 1000, 701, 2000),
        ("inverse_sqrt", 1000, 300, 500),
        ("cosine", 1000, 1, 2000),
        ("linear", 1000, 0, 10),
    ],
)
def test_a_number_of_steps_that_makes_no_difference_is_no_change(schedule, steps, done, wanted):
    before, after = settings(schedule, steps), settings(schedule, wanted)
    changes = changed_settings(before, after)
    assert [change.split(":")[0] for change in changes] == ["train.max_steps"]
    assert without_steps(changes, before, after, lambda: done) == []
    other = settings(schedule, wanted, seed=5)
    changes = changed_settings(before, other)
    assert without_steps(changes, before, other, lambda: done) == ["train.seed: 0 -> 5"]


@pytest.mark.parametrize(
    ("schedule", "steps", "done", "wanted", "since"),
    [
        ("cosine", 1000, 1000, 2000, 1),
        ("linear", 1000, 2, 2000, 1),
        ("hold", 1000, 500, 2000, 1),
        ("inverse_sqrt", 1000, 1000, 2000, 701),
        ("inverse_sqrt", 1000, 500, 600, 421),
    ],
)
def test_a_schedule_that_has_ended_is_told(schedule, steps, done, wanted, since):
    before, after = settings(schedule, steps), settings(schedule, wanted)
    with pytest.raises(ConfigError, match=f"from step {since} on this run .* ends at step {steps}"):
        without_steps(changed_settings(before, after), before, after, lambda: done)


def test_steps_are_not_counted_where_they_do_not_matter():
    before = settings("cosine", 10)
    assert without_steps(["seed"], before, Config(**before.model_dump()), pytest.fail) == ["seed"]


def test_steps_are_those_of_the_journal_or_of_the_newest_checkpoint(tmp_path):
    assert steps_done(tmp_path, "journal.qzo") == steps_done(tmp_path, None) == 0
    writer = JournalWriter.create(tmp_path / "journal.qzo", {"directions": "rademacher"})
    for step in range(3):
        writer.append(StepEntry(step, 0, 0.1, 0.01, 1.0, (0.5,)))
    writer.close()
    assert steps_done(tmp_path, "journal.qzo") == 3


def test_a_longer_run_is_the_one_that_was_long_from_its_beginning(train, tmp_path, capsys):
    constant = [*SETTINGS[2:], "sample.every=0", "train.schedule=constant"]
    assert train("--max-steps", 1, *constant, name="run") == 0
    assert train("--max-steps", 2, *constant, name="whole") == 0
    assert resume(tmp_path / "run", "--max-steps", 2) == 0
    assert load_equal(tmp_path / "run", tmp_path / "whole")
    capsys.readouterr()
    change = ["--max-steps", 3, "train.seed=1"]
    assert "train.seed: 0 -> 1" in failing(capsys, resume(tmp_path / "run", *change))


@pytest.mark.parametrize(
    ("name", "warmup", "until"),
    [
        ("constant", 0, 100),
        ("inverse_sqrt", 0, 71),  # its last three tenths fall to zero
        ("inverse_sqrt", 20, 77),
        ("cosine", 0, 1),
        ("linear", 30, 31),
        ("hold", 0, 1),
    ],
)
def test_schedules_of_two_lengths_agree_until_one_knows_its_end(name, warmup, until):
    short, long = (make_schedule(name, 0.3, steps, warmup) for steps in (100, 1000))
    found = agree_until(short, long, 100)
    assert found == until
    assert all(short(step) == long(step) for step in range(found))
    assert agree_until(long, short, found) == found
