"""Commands that were killed at any moment: the same command again replaces what was left."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from qzo_diffusion.cli import main
from qzo_diffusion.core.errors import OutputError
from qzo_diffusion.system import files
from qzo_diffusion.system.files import UNFINISHED, check_empty, unfinished, write_folder
from qzo_diffusion.train.run_folder import RunFolder


def sampling(run, out):
    prompts = str(run.parent / "prompts.txt")
    return ["sample", "--run", str(run), "--prompts", prompts, "--output-dir", str(out)]


def verbs_that_write(run, out):
    journal = ["--journal", str(run / "journal.qzo")]
    return {
        "sample": sampling(run, out),
        "mix": ["mix", "--run", f"{run}=0.5", "--output-dir", str(out)],
        "replay": ["replay", *journal, "--output-dir", str(out)],
        "delta": ["export", "--run", str(run), "--format", "delta", "--output-dir", str(out)],
        "journal": ["export", "--run", str(run), "--format", "journal", "--output-dir", str(out)],
    }


@pytest.mark.parametrize("verb", ["sample", "mix", "replay", "delta", "journal"])
def test_the_same_command_again_replaces_what_a_kill_left(run, tmp_path, monkeypatch, verb):
    command, out = verbs_that_write(run, tmp_path / "out")[verb], tmp_path / "out"
    assert _stopped(lambda: main(command) == 130, monkeypatch, "kill", 1)
    assert not (out / "samples" / "000.png").exists() or (out / UNFINISHED).exists()
    assert main(command) == 0
    assert not [name for name in os.listdir(out) if name.startswith((".", UNFINISHED))]
    assert not list(tmp_path.glob(".*"))


def in_parts(out):
    """As mixes, replays and samples are written."""
    folder = RunFolder.create(out)
    with unfinished(out, ("config.yaml", "final", "samples")):
        folder.write_text("config.yaml", "a: 1")
        write_folder(out / "samples", lambda place: (place / "0.png").touch(), marked=False)
        folder.save_scales("final", {"0": torch.ones(1)}, {})


def at_once(out):
    """As exports are written."""
    write_folder(out, lambda folder: (folder / "model").write_text("weights"))


@pytest.mark.parametrize("write", [in_parts, at_once])
@pytest.mark.parametrize("kind", ["kill", "interrupt"])
def test_a_stop_at_any_moment_leaves_nothing_that_is_in_the_way(tmp_path, monkeypatch, kind, write):
    stops, out = 0, tmp_path / "0"
    while _stopped(lambda out=out: write(out), monkeypatch, kind, stops):
        if kind == "interrupt":
            assert not out.exists() or not set(os.listdir(out)) - {"samples"}
        assert not (out / "final").exists() or (out / UNFINISHED).exists()
        check_empty(out)
        write(out)
        assert not [name for name in os.listdir(out) if name.startswith((".", UNFINISHED))]
        assert not list(tmp_path.glob(".*"))
        stops, out = stops + 1, tmp_path / str(stops + 1)
    assert stops >= 2


def _stopped(command, monkeypatch, kind, stops):
    """Whether the command was stopped at its rename number `stops`; after a kill nothing is
    cleaned up.
    """
    replace, calls = os.replace, []

    def replace_or_stop(*places):
        calls.append(places)
        if len(calls) == stops + 1 or (kind == "kill" and len(calls) > stops):
            raise KeyboardInterrupt
        replace(*places)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_or_stop)
        if kind == "kill":
            patch.setattr(shutil, "rmtree", lambda *args, **named: None)
            patch.setattr(files, "clear_leftovers", lambda folder: None)
            patch.setattr("pathlib.Path.unlink", lambda *args, **named: None)
        try:
            return bool(command())
        except KeyboardInterrupt:
            return True


def test_a_command_that_was_killed_by_the_system(run, tmp_path):
    """By SIGKILL, while its pictures are written; the same command again is `sample` itself."""
    out = tmp_path / "out"
    script = (
        "import sys, time; from pathlib import Path\n"
        "from qzo_diffusion.system.files import unfinished, write_folder\n"
        "out = Path(sys.argv[1]); (out / 'samples').mkdir(parents=True)\n"
        "def write(folder):\n"
        "    (folder / '000.png').touch(); print('writing', flush=True); time.sleep(100)\n"
        "with unfinished(out, ['samples']): write_folder(out / 'samples', write, marked=False)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(out)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "writing\n"
    with pytest.raises(OutputError, match="another process writes"):
        check_empty(out)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (out / UNFINISHED).is_file()
    assert not (out / "samples" / "000.png").exists()
    assert main(sampling(run, out)) == 0
    assert not (out / UNFINISHED).exists()
    assert {file.name for file in (out / "samples").iterdir()} >= {"000.png", "prompts.json"}


@pytest.mark.parametrize("names", ['["/etc"]', '["../x"]', '["mine.txt"]', "{}", "[[]]", "x"])
def test_a_forged_marker_removes_nothing_of_a_user_s(tmp_path, names):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / UNFINISHED).write_text(names)
    with pytest.raises(OutputError, match="not an empty folder"):
        RunFolder.create(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_full_disk_leaves_no_marker(tmp_path):
    def fill():
        with unfinished(tmp_path, ["final"]):
            (tmp_path / "final").mkdir()
            raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="No space left"):
        fill()
    assert not list(tmp_path.iterdir())


def test_a_run_that_was_killed_before_its_settings_were_written(tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / ".config.yaml.partial").write_text("half")
    RunFolder.create(tmp_path).write_text("config.yaml", "a: 1")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.yaml", "samples"]
