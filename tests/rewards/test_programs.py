"""Rewards that a user brings: what they see, what they answer, and how they fail."""

import math
import sys

import pytest
from PIL import Image

from qzo_diffusion.rewards.programs import Program, PythonFunction
from qzo_diffusion.rewards.reward import RewardError, Weighted

PICTURES = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (10, 250)]
PROMPTS = ["an apple", "a pear"]
SECONDS = 60.0


@pytest.fixture
def function(tmp_path):
    """A `python:` reward of some lines."""

    def build(*lines, name="score", seconds=SECONDS):
        file = tmp_path / "mine.py"
        file.write_text("\n".join(lines))
        return PythonFunction(file, name, seconds)

    return build


RED = ("def score(pictures, prompts):", "    print('hello')")


def test_a_function_sees_pictures_and_prompts(function):
    seen = (
        "    return [one.getpixel((0, 0))[0] + len(text) for one, text in zip(pictures, prompts)]"
    )
    reward = function(*RED, seen)
    assert reward(PICTURES, PROMPTS) == [18, 256]
    assert reward(PICTURES[:1], PROMPTS[:1]) == [18]


def test_a_function_is_loaded_once(function):
    reward = function("calls = []", *RED, "    calls.append(1)", "    return [len(calls)] * 2")
    assert [reward(PICTURES, PROMPTS)[0] for _ in range(2)] == [1, 2]


def test_only_the_picture_that_a_function_fails_on_is_left_out(function):
    check = "    assert pictures[0].getpixel((0, 0))[0] > 100"
    reward = function(*RED, check, "    return [1.0] * len(pictures)")
    first, second = reward(PICTURES, PROMPTS)
    assert math.isnan(first)
    assert second == 1


def test_a_value_that_is_no_number_is_nan(function):
    first, second = function(*RED, "    return [float('nan'), 2]")(PICTURES, PROMPTS)
    assert math.isnan(first)
    assert second == 2


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (("    raise KeyError('lost')",), "KeyError"),
        (("    return [1.0] * 3",), "3 values"),
        (("    return None",), "TypeError"),
        (("    import os", "    os._exit(3)"), "ended with 3"),
    ],
)
def test_a_function_that_fails_says_why(function, lines, reason):
    reward = function(*RED, *lines)
    with pytest.raises(RewardError, match=reason):
        reward(PICTURES, PROMPTS)


@pytest.mark.parametrize(
    ("lines", "reason"), [(("def other(): pass",), "score"), (("1 +",), "SyntaxError")]
)
def test_a_file_without_the_function_is_refused(function, lines, reason):
    with pytest.raises(RewardError, match=reason):
        function(*lines)


def test_a_function_that_hangs_is_stopped(function):
    reward = function("import time", *RED, "    time.sleep(600)", seconds=SECONDS)
    reward._seconds = 0.2
    with pytest.raises(RewardError, match=r"longer than 0\.2 seconds"):
        reward(PICTURES, PROMPTS)
    assert reward._process.poll() is not None


def program(tmp_path, *lines, seconds=SECONDS):
    file = tmp_path / "mine.py"
    file.write_text("\n".join(["import json, pathlib, sys", *lines]))
    return Program([sys.executable, str(file), "--flag"], seconds)


def test_a_program_sees_a_folder_and_answers_in_lines(tmp_path):
    reward = program(
        tmp_path,
        "folder = pathlib.Path(sys.argv[2])",
        "rows = json.loads((folder / 'prompts.json').read_text())",
        "assert sys.argv[1] == '--flag' and (folder / '001.png').is_file()",
        "for row in rows: print('nan' if row['prompt'] == 'a pear' else len(row['file']))",
    )
    first, second = reward(PICTURES, PROMPTS)
    assert first == 7
    assert math.isnan(second)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("print(1)", "1 values"),
        ("print('one'); print('two')", "could not convert"),
        ("sys.exit('it broke')", "it broke"),
    ],
)
def test_a_program_that_fails_says_why(tmp_path, line, reason):
    with pytest.raises(RewardError, match=reason):
        program(tmp_path, line)(PICTURES, PROMPTS)


def test_a_program_that_hangs_or_is_missing_is_an_error(tmp_path):
    slow = program(tmp_path, "import time; time.sleep(600)", seconds=0.5)
    with pytest.raises(RewardError, match=r"longer than 0\.5 seconds"):
        slow(PICTURES, PROMPTS)
    with pytest.raises(RewardError, match="can't be started"):
        Program([str(tmp_path / "none")], SECONDS)(PICTURES, PROMPTS)


def test_weights_add_up_and_a_bad_value_counts_for_the_sum():
    rewards = {"a": lambda *_: [1.0, 2.0], "b": lambda *_: [0.5, math.inf]}
    first, second = Weighted(rewards, {"a": 2.0, "b": -4.0})(PICTURES, PROMPTS)
    assert first == 0
    assert math.isnan(second)


def test_another_number_of_values_than_pictures_is_an_error():
    with pytest.raises(RewardError, match="1 values of the reward a for 2 pictures"):
        Weighted({"a": lambda *_: [1.0]}, {"a": 1.0})(PICTURES, PROMPTS)
