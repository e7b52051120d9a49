"""The last words of a run and of a trial step."""

import shlex

import pytest

from qzo_diffusion.cli import parse
from qzo_diffusion.runs.ending import in_words, last_words


def results(folder, **changed):
    return {
        "run": str(folder),
        "steps": 671,
        "max_steps": 1000,
        "stopped": False,
        "validation_loss": {"start": 0.85, "end": 0.739},
        "seconds": 90.0,
        "peak_memory_gb": 1.5,
    } | changed


@pytest.mark.parametrize("kind", ["style", "llm"])
@pytest.mark.parametrize("stopped", [True, False])
def test_every_command_that_is_named_parses(tmp_path, kind, stopped):
    folder = tmp_path / "a run's folder"
    text = last_words(results(folder, stopped=stopped), kind)
    commands = [line.strip() for line in text.splitlines() if line.startswith("  qzo-diffuse ")]
    assert len(commands) == (1 if stopped else 2)
    for command in commands:
        options = parse(shlex.split(command)[1:])
        named = options.resume if stopped else str(options.run)
        assert named == str(folder)


def test_a_stopped_run_says_how_far_it_came(tmp_path):
    text = last_words(results(tmp_path, stopped=True), "style")
    assert text.startswith("stopped at step 671 of 1000; go on with:")
    assert "done" not in text


def test_what_is_there_is_named_and_nothing_else(tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "grid.png").touch()
    text = last_words(results(tmp_path), "style")
    assert str(tmp_path / "samples/grid.png") in text
    assert "report.html" not in text
    assert "0.8500 -> 0.7390" in text
    assert "1.5 min" in text
    assert "1.50 GB" in text
    bare = last_words(results(tmp_path, validation_loss=None, peak_memory_gb=None), "style")
    assert "loss" not in bare
    assert "memory" not in bare


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.5432, "0.543 s"), (59.9, "59.9 s"), (90, "1.5 min"), (9000, "2.5 h")]
)
def test_durations(seconds, text):
    assert in_words(seconds) == text
