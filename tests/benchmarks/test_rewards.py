"""The benchmark of rewards: its arithmetic, and how rows get into one file."""

import json

import pytest

from benchmarks.rewards.__main__ import written
from benchmarks.rewards.cma_es import pictures_to_reach
from benchmarks.rewards.runs import PROMPTS, training_prompts
from qzo_diffusion import resources
from qzo_diffusion.diffusion.prompts import read_prompt_file


def test_the_crossing_is_on_the_line_between_two_scores():
    curve = [(0, 1.0), (100, 1.0), (200, 3.0), (300, 2.0)]
    assert pictures_to_reach(curve, 2.0) == 150
    assert pictures_to_reach(curve, 3.0) == 200
    assert pictures_to_reach(curve, 3.1) is None


def test_rows_stand_beside_each_other(tmp_path):
    written("style", {"style_delta": 0.5}, tmp_path)
    path = written("step", {"=step_over_sampling": 1.01, "rounds": 3}, tmp_path)
    found = json.loads(path.read_text())
    assert found["style"] == {"style_delta": 0.5}
    assert found["step"] == {"rounds": 3}
    assert found["step_over_sampling"] == 1.01
    assert found["provenance"].keys() == {"style", "step"}


def test_prompts_to_train_on_are_none_of_those_that_are_scored(tmp_path):
    trained = read_prompt_file(training_prompts(tmp_path)).texts
    assert len(set(trained)) == PROMPTS
    for name in ("tiny_grid", "tiny_score"):
        shown = read_prompt_file(resources.shipped("prompts") / f"{name}.txt").texts
        assert not set(shown) & set(trained)


@pytest.mark.slow
def test_a_step_and_a_sampling_draw_as_many_pictures():
    from benchmarks.rewards.step_cost import measured

    found = measured("tiny", 1)
    assert 0.2 < found["time"] < 5
    assert found["memory"] > 0
