"""A run that was stopped, killed or damaged goes on as if nothing had happened, or says why it
can't.
"""

import importlib
import json
import os
import shutil
import signal

import pytest

from qzo_diffusion.cli import main
from qzo_diffusion.config.files import read_yaml
from qzo_diffusion.core.errors import JournalError
from qzo_diffusion.core.journal import Journal, encoded, read_journal
from qzo_diffusion.runs import provenance
from qzo_diffusion.train import calibrate
from tests.conftest import failing
from tests.forked import ended
from tests.runs.short_run import (
    SETTINGS,
    assert_replayed,
    assert_same_run,
    in_parts,
    load_equal,
    resume,
)


@pytest.mark.parametrize("step", [0, 3])
def test_a_stopped_run_goes_on_bit_for_bit(train, whole, tmp_path, monkeypatch, step):
    parts = in_parts(train, tmp_path, monkeypatch, *SETTINGS, after=step)
    assert_same_run(whole, parts)


REGIONS = [
    "--model",
    "tiny",  # whose losses have a curvature that can be told from chance
    "qzo.parametrization=separable",
    "qzo.per_example=true",
    "qzo.regions=4",
    "train.optimizer=sgd",
    "prior.bound=0.02",
    "prior.decay=0.2",
    "train.calibrate_lr=true",
]


def test_regions_go_on_and_are_replayed_bit_for_bit(train, tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "FULL_RATE", 5.0)  # so that these images' rate is lowered
    assert train(*SETTINGS, *REGIONS, name="whole") == 0
    parts = in_parts(train, tmp_path, monkeypatch, *SETTINGS, *REGIONS, after=2)
    assert_same_run(tmp_path / "whole", parts)
    journal = read_journal(tmp_path / "whole/journal.qzo")
    assert {len(step.projected_grad) for step in journal.steps} == {4 * 4 * 8}
    # calibrated once, though the run was resumed
    assert journal.steps[0].lr == 0.1 * journal.header["lr_factor"] < 0.1
    assert journal.header["prior"] == [0.2, 0.02]
    assert journal.header["bound_factor"] < 1
    assert_replayed(tmp_path / "whole")


def test_a_rate_that_is_chosen_on_going_on_is_taken_as_it_is(train, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(calibrate, "FULL_RATE", 5.0)
    assert train(*REGIONS, "train.schedule=constant", "--max-steps", 1, name="run") == 0
    assert "train.lr 0.16 -> " in capsys.readouterr().err
    assert resume(tmp_path / "run", "--max-steps", 2, "train.lr=0.07", "--force") == 0
    journal = read_journal(tmp_path / "run/journal.qzo")
    assert [step.lr for step in journal.steps] == [0.16 * journal.header["lr_factor"], 0.07]


MOMENTS = {
    "before a metrics line": ("qzo_diffusion.train.tracking.Tracker.on_step", 4),
    "between metrics and journal": ("qzo_diffusion.core.journal.JournalWriter.append", 4),
    "before a checkpoint": ("qzo_diffusion.runs.trainer.save_checkpoint", 1),
    "inside a checkpoint": ("qzo_diffusion.train.checkpoint.write_whole", 1),
    "between a folder and its name": ("qzo_diffusion.system.files.os.replace", 12),
    "before a picture": ("qzo_diffusion.runs.style.samples.save_picture", 2),
}


# the others with -m slow: each costs a start of Python
EVERY_TIME = ("between metrics and journal", "inside a checkpoint")


@pytest.mark.parametrize(
    "moment",
    [pytest.param(m, marks=[] if m in EVERY_TIME else [pytest.mark.slow]) for m in MOMENTS],
)
def test_killed_at_the_worst_moments_it_goes_on_bit_for_bit(
    train_arguments, whole, tmp_path, moment
):
    """Another process dies without any clean-up at the n-th call of a function; nothing may be lost
    but the step in hand.
    """
    arguments = train_arguments(*SETTINGS, name="parts")
    code, errors = ended(_train_and_die, *MOMENTS[moment], arguments)
    assert code == -signal.SIGKILL, f"the run ended before the moment came: {errors[-500:]}"
    assert main(["train", "--resume", "latest", "--output-dir", str(tmp_path / "parts")]) == 0
    assert_same_run(whole, tmp_path / "parts")


def _train_and_die(target, count, arguments):
    _die_at_call(target, count)
    main(arguments)


def _die_at_call(target, count):
    parts = target.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            owner = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        break
    for name in parts[cut:-1]:
        owner = getattr(owner, name)
    original, calls = getattr(owner, parts[-1]), []

    def dying(*arguments, **options):
        calls.append(1)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(owner, parts[-1], dying)


def test_a_run_without_its_journal_begins_where_nothing_was_trained(whole, tmp_path, capsys):
    """It was stopped while it encoded, loaded or calibrated."""
    early = tmp_path / "early"
    (early / "samples").mkdir(parents=True)
    for name in ("config.yaml", "environment.json"):
        shutil.copy(whole / name, early)
    assert resume(early) == 0
    assert_same_run(whole, early)
    (early / "journal.qzo").unlink()
    capsys.readouterr()
    assert "no journal.qzo" in failing(capsys, resume(early))


def test_where_nothing_was_trained_other_settings_will_do(whole, tmp_path):
    """As where the device had no room for those that the run was begun with."""
    early = tmp_path / "early"
    (early / "samples").mkdir(parents=True)
    shutil.copy(whole / "config.yaml", early)
    assert resume(early, "--max-steps", 1, "train.lr=0.07", "sample.batch_size=1") == 0
    assert read_yaml(early / "config.yaml")["train"]["lr"] == 0.07
    assert [step.lr for step in read_journal(early / "journal.qzo").steps] == [0.07]


def test_killed_in_its_first_step_it_goes_on_bit_for_bit(whole, tmp_path):
    """The metrics have a line of step 0 that the journal lacks: it is cut off, not doubled."""
    early, journal = tmp_path / "early", read_journal(whole / "journal.qzo")
    shutil.copytree(whole, early, ignore=shutil.ignore_patterns("checkpoints", "final"))
    (early / "journal.qzo").write_bytes(encoded(journal.header, ()))
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    first = next(at for at, line in enumerate(lines) if '"projected_grad"' in line)
    (early / "metrics.jsonl").write_text("".join(lines[: first + 1]))
    assert resume(early) == 0
    assert_same_run(whole, early)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("train.optimizer=sgd", "optimizer = 'momentum'"),
        ("qzo.directions=gaussian", "directions"),
        ("train.max_steps=3", "but 4 steps are done"),
    ],
)
def test_settings_that_can_not_go_on_leave_the_run_as_it_was(whole, stopped, capsys, change, told):
    files = [stopped / "config.yaml", stopped / "journal.qzo", stopped / "metrics.jsonl"]
    before = [file.read_bytes() for file in files]
    capsys.readouterr()
    assert told in failing(capsys, resume(stopped, change, "--force"))
    assert [file.read_bytes() for file in files] == before
    assert resume(stopped) == 0
    assert load_equal(whole, stopped)


def test_how_feedback_decays_is_settled_when_a_run_begins():
    header = {"format": provenance.JOURNAL_FORMAT, "optimizer": "feedback", "feedback": [0.95, 40]}
    journal = Journal(header, (), (), (), "", 0, 0)
    provenance.check_journal_fits(journal, dict(header))
    with pytest.raises(JournalError, match="feedback = "):
        provenance.check_journal_fits(journal, header | {"feedback": [0.5, 40]})


def test_a_rate_is_calibrated_where_a_run_begins_or_not_at_all(train, tmp_path, capsys):
    assert train("--max-steps", 0, "train.calibrate_lr=true", name="run") == 0
    more = ["--max-steps", 1, "--force"]
    capsys.readouterr()
    assert "was not calibrated where it began" in failing(capsys, resume(tmp_path / "run", *more))
    assert resume(tmp_path / "run", *more, "train.calibrate_lr=false") == 0
    assert [step.lr for step in read_journal(tmp_path / "run/journal.qzo").steps] == [0.05]


def test_changed_settings_are_refused_with_the_difference_unless_forced(stopped, capsys):
    capsys.readouterr()
    before = read_journal(stopped / "journal.qzo").steps
    rate = read_yaml(stopped / "config.yaml")["train"]["lr"]
    assert f"train.lr: {rate} -> 0.5" in failing(capsys, resume(stopped, "train.lr=0.5"))
    assert resume(stopped, "train.lr=0.5", "--force") == 0
    notes = [
        entry
        for entry in read_journal(stopped / "journal.qzo").entries
        if getattr(entry, "kind", "") == "resume"
    ]
    assert notes[-1].content["changes"] == [f"train.lr: {rate} -> 0.5"]
    steps = read_journal(stopped / "journal.qzo").steps
    assert steps[:4] == before
    assert all(step.lr > 10 * rate for step in steps[4:])


def test_a_run_that_had_too_little_memory_goes_on_with_less_at_once(whole, stopped):
    less = ["train.micro_batch_size=1", "sample.batch_size=1"]
    assert resume(stopped, *less) == 0
    assert read_yaml(stopped / "config.yaml")["train"]["micro_batch_size"] == 1
    journal = read_journal(stopped / "journal.qzo")
    (note,) = (one for one in journal.entries if getattr(one, "kind", "") == "resume")
    assert [change.partition(":")[0] for change in note.content["changes"]] == [
        setting.partition("=")[0] for setting in less
    ]
    for ours, others in zip(journal.steps, read_journal(whole / "journal.qzo").steps, strict=True):
        assert ours.projected_grad == pytest.approx(others.projected_grad, rel=0.01)
    assert_replayed(stopped)


def test_changed_images_are_refused_with_the_difference(stopped, images, capsys):
    (images / "5.png").unlink()
    (images / "5.txt").unlink()
    (images / "4.txt").write_text("another caption")
    capsys.readouterr()
    error = failing(capsys, resume(stopped))
    assert "image 5.png was removed" in error
    assert "image 4.png: other caption" in error


def test_another_base_is_refused(stopped, tmp_path, capsys):
    settings = (stopped / "config.yaml").read_text()
    (stopped / "config.yaml").write_text(settings.replace("type: nf4", "type: fp4"))
    capsys.readouterr()
    assert "codes" in failing(capsys, resume(stopped))


@pytest.mark.parametrize("where", ["nowhere", "empty"])
def test_resuming_what_is_not_there(tmp_path, capsys, where):
    folder = tmp_path / where
    if where == "empty":
        folder.mkdir()
    failing(capsys, resume(folder))


def test_latest_is_the_newest_run_below_outputs(train, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train("--max-steps", 1, name="outputs/old") == 0
    assert train("--max-steps", 1, name="outputs/new") == 0
    assert main(["train", "--resume", "latest", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"] == "outputs/new"


def test_a_run_goes_on_in_its_own_folder(stopped, tmp_path, capsys):
    capsys.readouterr()
    assert "leave --output-dir out" in failing(
        capsys, resume(stopped, "--output-dir", tmp_path / "other")
    )
    assert not (tmp_path / "other").exists()
    assert main(["train", "--resume", "latest", "--output-dir", str(stopped)]) == 0
