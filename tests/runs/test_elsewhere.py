"""Whole runs where parts of this machine are hidden: Windows lacks some, and some devices lack
bitsandbytes.
"""

import ast
import os
import sys
from pathlib import Path

import pytest
import torch
import yaml

from qzo_diffusion import resources
from qzo_diffusion.cli import main
from qzo_diffusion.core import locks
from qzo_diffusion.core.journal import read_journal
from tests.conftest import failing
from tests.runs.short_run import load_equal

PACKAGE = Path(__file__).parents[2] / "qzo_diffusion"
POSIX = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "posix"}


def unguarded(tree):
    """Modules that a source imports where a missing one is not taken care of."""
    guarded = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.Try)
        and any("ImportError" in ast.unparse(one.type or node) for one in node.handlers)
        for part in node.body
        for inner in ast.walk(part)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and node not in guarded:
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node not in guarded:
            yield (node.module or "").partition(".")[0]


def test_no_module_that_windows_lacks_is_needed_for_an_import():
    wrong = {
        path.name: POSIX & set(unguarded(ast.parse(path.read_text("utf-8"))))
        for path in PACKAGE.rglob("*.py")
    }
    assert {name: modules for name, modules in wrong.items() if modules} == {}
    assert set(unguarded(ast.parse("try:\n import pwd\nexcept ImportError:\n pass"))) == set()
    assert set(unguarded(ast.parse("def f():\n from fcntl import flock"))) == {"fcntl"}


@pytest.fixture
def windows(monkeypatch):
    """What Windows lacks is not here."""
    monkeypatch.setattr(locks, "fcntl", None)
    monkeypatch.setattr(locks, "msvcrt", None)
    for name in ("pwrite", "O_DIRECTORY", "geteuid"):
        monkeypatch.delattr(os, name)
    real = os.open

    def no_folders(path, *args, **options):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(os, "open", no_folders)


def test_a_run_without_what_windows_lacks_is_the_same_run(train, tmp_path, request):
    steps = ["--max-steps", 2, "train.checkpoint_every=1"]
    assert train(*steps, name="here") == 0
    request.getfixturevalue("windows")
    assert train(*steps, name="there") == 0
    assert load_equal(tmp_path / "here", tmp_path / "there")
    here, there = (read_journal(tmp_path / name / "journal.qzo") for name in ("here", "there"))
    assert here.steps == there.steps
    assert len(there.steps) == 2


def test_without_user_ids_the_last_place_for_a_cache_is_the_users_temporary_folder(
    monkeypatch, tmp_path
):
    monkeypatch.delattr(os, "getuid")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(resources, "_can_be_made", lambda folder: False)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert resources.cache_folder() == tmp_path / "qzo_diffusion"


@pytest.fixture
def without_bitsandbytes(monkeypatch):
    """Importing it raises ImportError."""
    for name in [name for name in sys.modules if name.split(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)


@pytest.mark.usefixtures("without_bitsandbytes")
def test_without_bitsandbytes_a_run_takes_the_reference_back_end_and_says_so(
    train, tmp_path, capsys
):
    assert train("--max-steps", 1) == 0
    assert "warning: bitsandbytes can't be imported" in capsys.readouterr().err
    run = tmp_path / "run"
    assert yaml.safe_load((run / "config.yaml").read_text())["quant"]["backend"] == "reference"
    sample = ["sample", "--run", str(run), "--prompt", "a cat", "--steps", "1", "--quiet"]
    assert main([*sample, "--output-dir", str(tmp_path / "pictures")]) == 0
    assert len(list((tmp_path / "pictures").rglob("*.png"))) >= 1


def test_a_run_of_bitsandbytes_says_what_it_needs_where_that_is_missing(
    train, tmp_path, capsys, request
):
    assert train("--max-steps", 0) == 0
    request.getfixturevalue("without_bitsandbytes")
    sample = ["sample", "--run", str(tmp_path / "run"), "--prompt", "a cat", "--steps", "1"]
    error = failing(capsys, main([*sample, "--output-dir", str(tmp_path / "pictures")]))
    assert "bitsandbytes can't be imported" in error


@pytest.mark.parametrize("mode", ["nf4", "full"])
def test_a_run_in_float16_computes_t5_in_float32(train, tmp_path, monkeypatch, mode):
    """A GPU without bfloat16 runs in float16, beyond whose range T5 reaches."""
    from qzo_diffusion.diffusion import text_encoders

    original, seen = text_encoders.t5_states, []

    def t5_states(encoder, *rest):
        states = original(encoder, *rest)
        seen.extend(state.dtype for state in states)
        return states

    monkeypatch.setattr("qzo_diffusion.diffusion.families.t5.t5_states", t5_states)
    own_cache = f"data.cache_dir={tmp_path / 'cache'}"
    settings = ["compute.dtype=float16", f"text.t5={mode}", own_cache]
    assert train("--max-steps", 1, *settings) == 0
    assert set(seen) == {torch.float32}
    (step,) = read_journal(tmp_path / "run" / "journal.qzo").steps
    assert not step.skipped
