"""Flags that are no settings, as a user types them; and the order in which things are looked at."""

import json
import os
import subprocess
import sys

import pytest

from qzo_diffusion.cli import main, parse
from qzo_diffusion.config.arguments import unusual
from qzo_diffusion.core.errors import ConfigError
from tests.conftest import failing


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["sample", "--seed", "-1"], "--seed: -1"),
        (["sample", "--seed", str(2**63)], "9223372036854775807"),
        (["sample", "--seed", "1.5"], "--seed: 1.5"),
        (["sample", "--strength", "inf"], "-100 to 100"),
        (["sample", "--strength", "much"], "--strength: much"),
        (["sample", "--steps", "0"], "1 or more"),
        (["sample", "--guidance", "-0.5"], "0 or more"),
        (["sample", "--guidance", "nan"], "0 or more"),
        (["mix", "--run", "a=-inf"], "--run: -inf"),
        (["mix", "--run", "a=1", "--run", "a=b=1e400"], "--run: 1e400"),
        (["mix", "--run", "=1"], "RUN=WEIGHT"),
        (["mix", "--run", "a"], "RUN=WEIGHT"),
        (["replay", "--journal", "j", "--to-step", "-3"], "--to-step: -3"),
        (["sample", "--run", ""], "--run: ''"),
    ],
)
def test_numbers_and_paths_are_checked_before_anything_loads(arguments, word, capsys, tmp_path):
    error = failing(capsys, main([*arguments, "--output-dir", str(tmp_path / "out")]))
    assert word in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["sample", "--output-dir", "o", "--pro", "p.txt"],
        ["sample", "--output-dir", "o", "--stren", "1"],
        ["train", "--max", "3"],
        ["llm", "train", "--data", "d"],
        ["llm", "evaluate", "--mod", "m"],
        ["evaluate", "--comp", "a", "b"],
        ["doctor", "--js"],
    ],
)
def test_flags_are_not_abbreviated(arguments):
    with pytest.raises(ConfigError):
        parse(arguments)


def test_prompts_are_a_file_or_texts():
    common = ["sample", "--output-dir", "o"]
    found = parse([*common, "--prompt", "a #1", "--prompt", "b", "--negative-prompt", ""])
    assert (found.prompt, found.prompts, found.negative_prompt) == (["a #1", "b"], None, "")
    with pytest.raises(ConfigError, match="not allowed with"):
        parse([*common, "--prompt", "a", "--prompts", "p.txt"])


def test_a_flag_that_is_given_twice_is_told(capsys):
    found = parse(["sample", "--output-dir", "o", "--seed", "1", "--seed", "2"])
    assert found.seed == 2
    assert "--seed is given twice" in capsys.readouterr().err


@pytest.mark.parametrize(("strength", "told"), [(0, 0), (1.5, 0), (-0.1, 1), (2, 1)])
def test_strengths_that_pictures_do_not_survive_are_told(strength, told):
    assert bool(unusual(strength, "--strength")) == bool(told)


def test_a_home_is_written_out_in_flags(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    found = parse(["sample", "--run", "~/run", "--model", "~/sd", "--output-dir", "~/o"])
    paths = (str(found.run), found.model, str(found.output_dir))
    assert paths == ("/somewhere/run", "/somewhere/sd", "/somewhere/o")
    found = parse(["mix", "--run", "~/a=b=0.5", "--output-dir", "o"])
    assert [(str(path), weight) for path, weight in found.run] == [("/somewhere/a=b", 0.5)]


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--style-dir", b"im\xe4ges"],
        ["sample", "--output-dir", "o", "--run", b"\xff"],
        ["train", b"data.cache_dir=\xe9"],
        ["validate", "--config", b"\x80.yaml"],
    ],
)
def test_names_that_are_not_utf8_are_refused_at_the_start(arguments, capsys):
    texts = [os.fsdecode(argument) for argument in arguments]
    assert "UTF-8" in failing(capsys, main(texts))


def test_a_current_folder_that_is_not_utf8_or_gone_is_refused(tmp_path, monkeypatch, capsys):
    folder = os.path.join(os.fsencode(tmp_path), b"\xe4")
    os.mkdir(folder)
    monkeypatch.chdir(os.fsdecode(folder))
    assert "UTF-8" in failing(capsys, main(["validate", "--config", "tiny"]))
    os.rmdir(folder)
    assert "deleted" in failing(capsys, main(["validate", "--config", "tiny"]))


WITHOUT_TORCH = """
import json, sys
from qzo_diffusion.cli import main
for arguments in json.loads(sys.argv[1]):
    print(main(arguments), "torch" in sys.modules)
"""
TYPOS = [
    ["train", "--style-dir", "imgs", "train.learning_rate=1"],
    ["train", "--resume", "run", "train.lr=fast"],
    ["llm", "train", "--max-steps", "-1"],
    ["llm", "evaluate", "data.max_tokens=no"],
    ["validate", "--config", "run/config.yaml"],
    ["sample", "--output-dir", "o", "--seed", "-1"],
    ["mix", "--output-dir", "o", "--run", "run=nan"],
]


def test_typos_are_told_without_torch(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("model: tiny\ntrain: {lr: -1}\n")
    command = [sys.executable, "-c", WITHOUT_TORCH, json.dumps(TYPOS)]
    done = subprocess.run(
        command, cwd=tmp_path, env=_here(), capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines() == ["2 False"] * len(TYPOS), done.stderr


AT_TORCH = """
import importlib.abc, os, sys
class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *_):
        if name == "torch":
            print(*(os.environ.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")))
            raise SystemExit
sys.meta_path.insert(0, Watch())
from qzo_diffusion.cli import main
main(["doctor"])
print("torch was not asked for")
"""


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, ["None", "30000"]),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, ["ACTIVE", "None"]),
        ({"GOMP_SPINCOUNT": "7"}, ["None", "7"]),
    ],
)
def test_threads_that_wait_spin_for_a_short_time_unless_the_user_says_otherwise(given, found):
    """OpenMP reads the variables when torch is imported."""
    waiting = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    environment = {name: at for name, at in _here().items() if name not in waiting} | given
    done = subprocess.run(
        [sys.executable, "-c", AT_TORCH],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split() == found, done.stderr


def _here():
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
