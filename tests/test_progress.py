"""What a run says on its way: a bar on a terminal, lines in a log, nothing where nobody asks."""

import io
import sys

import pytest

from qzo_diffusion import cli
from qzo_diffusion.commands import doctor
from qzo_diffusion.core.errors import ConfigError
from qzo_diffusion.system import progress
from qzo_diffusion.system.console import emit, quiet, report
from qzo_diffusion.system.progress import Progress
from qzo_diffusion.train.tracking import Tracker


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def no_variable(monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)


def work(clock, count, seconds, **options):
    """`count` pieces of work, each of so many seconds."""
    with Progress(total=count, desc="work", mininterval=0, miniters=1, **options) as bar:
        for _ in range(count):
            clock[0] += seconds
            bar.update()


@pytest.mark.usefixtures("no_variable")
def test_a_log_gets_a_whole_line_every_half_minute(clock, capsys):
    work(clock, 20, 10.0, leave=False)
    written = capsys.readouterr().err
    assert "\r" not in written
    lines = written.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        f"work: {done} of 20" for done in (3, 6, 9, 12, 15, 18)
    ]


@pytest.mark.usefixtures("no_variable")
def test_short_work_is_not_mentioned_in_a_log_and_what_stays_has_a_last_line(clock, capsys):
    work(clock, 5, 1.0, leave=False)
    assert capsys.readouterr().err == ""
    work(clock, 5, 1.0)
    assert capsys.readouterr().err.startswith("work: 5 of 5, ")


@pytest.mark.usefixtures("no_variable")
def test_a_message_is_a_line_of_its_own_and_brings_no_other(clock, capsys):
    with Progress(total=3, desc="work", leave=False) as bar:
        bar.write("news", file=sys.stderr)
        bar.update()
    assert capsys.readouterr().err == "news\n"


@pytest.mark.usefixtures("no_variable")
def test_a_terminal_gets_a_bar(clock, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    work(clock, 2, 1.0)
    assert terminal.getvalue().count("\r") >= 2
    assert "100%" in terminal.getvalue()


@pytest.mark.parametrize(("value", "shown"), [("1", False), ("true", False), ("0", True)])
def test_tqdms_own_variable_hides_progress_and_no_message(
    clock, monkeypatch, capsys, tmp_path, value, shown
):
    monkeypatch.setenv("TQDM_DISABLE", value)
    work(clock, 3, 40.0)
    assert ("of 3" in capsys.readouterr().err) == shown
    tracker = Tracker(tmp_path, 3)
    tracker.on_validation(1, 0.25)
    tracker.close()
    assert "step 1: held-out loss 0.2500" in capsys.readouterr().err


@pytest.mark.usefixtures("no_variable")
def test_quiet_leaves_warnings_and_results(clock, capsys, tmp_path):
    with quiet(True):
        work(clock, 3, 40.0)
        tracker = Tracker(tmp_path, 3)
        tracker.on_validation(1, 0.25)
        tracker.report("warning: no samples")
        tracker.close()
        report("model: tiny")
        report("warning: disk full")
        emit({}, False, "done")
    assert capsys.readouterr().err == "warning: no samples\nwarning: disk full\ndone\n"
    report("model: tiny")
    assert capsys.readouterr().err == "model: tiny\n"


def test_the_flag_makes_a_verb_quiet_and_errors_are_shown(monkeypatch, capsys):
    def run(options):
        report("on the way")
        raise ConfigError("this", "that", "do so")

    monkeypatch.setattr(doctor, "run", run)
    assert cli.main(["doctor", "--quiet"]) == 2
    written = capsys.readouterr().err
    assert "on the way" not in written
    assert "got: this" in written
    assert cli.main(["doctor"]) == 2
    assert "on the way" in capsys.readouterr().err
