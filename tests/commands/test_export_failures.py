"""Exports that are refused, interrupted, killed or damaged: nothing is left that would be used."""

import shutil
import signal

import pytest
import yaml

from qzo_diffusion import resources
from qzo_diffusion.cli import main
from qzo_diffusion.runs.style import export as export_run
from tests.commands.short_runs import export_arguments
from tests.conftest import failing
from tests.forked import ended
from tests.killed_writing import kill_while_writing

pytestmark = pytest.mark.usefixtures("small_tiny")


@pytest.mark.parametrize("where", [".", "../here"])
def test_the_current_folder_is_not_replaced(finished, tmp_path, capsys, monkeypatch, where):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(export_run.pipeline, "load_base", None)
    command = ["export", "--run", str(finished), "--format", "delta", "--output-dir", where]
    assert "is the current folder" in failing(capsys, main(command))
    assert [file.name for file in tmp_path.iterdir()] == ["here"]


def test_nothing_is_overwritten(finished, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    assert "not an empty folder" in failing(
        capsys, main(export_arguments(finished, tmp_path / "out"))
    )
    assert (tmp_path / "out" / "file").read_text() == "mine"


def test_too_little_room_is_told_before_anything_is_written(
    finished, tmp_path, capsys, monkeypatch
):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        "qzo_diffusion.system.files.shutil.disk_usage", lambda path: usage._replace(free=1000)
    )
    assert "GB free for an export" in failing(
        capsys, main(export_arguments(finished, tmp_path / "out"))
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["nf4", "bf16", "delta"])
def test_what_does_not_read_back_is_no_export(finished, tmp_path, capsys, monkeypatch, kind):
    plain = export_run.write_tensors

    def flipped(file, *args):
        plain(file, *args)
        data = bytearray(file.read_bytes())
        data[-9] ^= 1
        file.write_bytes(data)

    monkeypatch.setattr(export_run, "write_tensors", flipped)
    failing(capsys, main(export_arguments(finished, tmp_path / "out", kind)))
    assert not (tmp_path / "out").exists()


def test_an_interrupted_export_leaves_no_export_and_the_next_one_works(
    export, finished, tmp_path, monkeypatch
):
    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(export_run, "compare_tensors", interrupted)
        assert main(export_arguments(finished, tmp_path / "out", "delta")) == 130
    assert not (tmp_path / "out").exists()
    assert (export("delta") / "COMPLETE").is_file()


def export_and_die(left, small, command):
    resources.tiny_model = lambda: small
    kill_while_writing(export_run, left)
    main(command)


@pytest.mark.parametrize("left", [0, 40])
def test_an_export_that_is_killed_leaves_nothing_that_is_used(
    export, finished, pipeline, tmp_path, left
):
    command = export_arguments(finished, tmp_path / "out", "nf4")
    code, said = ended(export_and_die, left, pipeline, command)
    assert code == -signal.SIGKILL, said
    assert not (tmp_path / "out").exists()
    assert (export("nf4") / "COMPLETE").is_file()


def test_formats_that_do_not_fit_the_run_are_refused(finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "fp4")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["quant"]["type"] = "fp4"
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    assert "a run in fp4" in failing(capsys, main(export_arguments(run, tmp_path / "out")))
    (run / "config.yaml").unlink()
    assert "no config.yaml" in failing(capsys, main(export_arguments(run, tmp_path / "out")))
