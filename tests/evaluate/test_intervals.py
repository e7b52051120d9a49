"""Intervals against theory: they cover what they should, and say nothing where nothing can be
said.
"""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qzo_diffusion.evaluate import intervals


def test_the_interval_of_a_mean_is_as_wide_as_theory_says():
    """Half width 1.96 s / √n; percentiles of 2,000 resamples scatter by about 3 % of it, so 15 % is
    five deviations.
    """
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    low, high = intervals.of_mean(values.tolist())
    half = 1.96 * values.std() / math.sqrt(400)
    assert (high - low) / 2 == pytest.approx(half, rel=0.15)
    assert (high + low) / 2 == pytest.approx(values.mean(), abs=0.15 * half)


def test_ninety_five_in_a_hundred_intervals_hold_the_truth():
    """200 sets of 40: 190 expected; the bootstrap falls a little short at this size.

    170 is beyond any chance of a right method.
    """
    draws = np.random.default_rng(1).normal(0.0, 1.0, (200, 40))
    holds = [low <= 0 <= high for low, high in (intervals.of_mean(row.tolist()) for row in draws)]
    assert 170 <= sum(holds) < 200


def test_values_of_one_cluster_are_drawn_together():
    """Four copies of each value are no more knowledge than one: the interval stays as wide, not
    half as wide.
    """
    values = np.random.default_rng(2).normal(0.0, 1.0, 50)
    alone = intervals.of_mean(values.tolist())
    copies = intervals.of_mean(
        np.repeat(values, 4).tolist(), clusters=[str(index // 4) for index in range(200)]
    )
    blind = intervals.of_mean(np.repeat(values, 4).tolist())
    assert (copies[1] - copies[0]) == pytest.approx(alone[1] - alone[0], rel=0.15)
    assert (blind[1] - blind[0]) < 0.7 * (copies[1] - copies[0])


def test_one_value_has_no_interval_and_no_deviation():
    assert intervals.summary([0.5]) == {"n": 1, "mean": 0.5, "std": None, "ci95": None}
    assert intervals.of_mean([1.0, 2.0, 3.0], clusters=["a", "a", "a"]) is None
    assert intervals.of_difference([1.0], [1.0, 2.0]) is None


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=40))
def test_a_set_against_itself_differs_by_nothing(values):
    found = intervals.paired(values, values)
    assert found["delta"] == 0
    assert found["delta_ci95"] == (0, 0)


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30), st.floats(-1e3, 1e3))
def test_an_interval_moves_with_its_values(values, shift):
    low, high = intervals.of_mean(values)
    moved = intervals.of_mean([value + shift for value in values])
    assert moved == pytest.approx((low + shift, high + shift), abs=1e-9)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9


def test_independent_sets_have_a_wider_difference_than_pairs():
    first = np.random.default_rng(3).normal(0.0, 1.0, 100)
    second = first + 0.1
    pairs = intervals.paired(second.tolist(), first.tolist())["delta_ci95"]
    apart = intervals.of_difference(second.tolist(), first.tolist())
    assert pairs == pytest.approx((0.1, 0.1))
    assert apart[0] < 0 < apart[1]


def test_resamples_are_the_same_every_time():
    assert np.array_equal(intervals.counts(10), intervals.counts(10))
    assert not np.array_equal(intervals.counts(10), intervals.counts(10, seed=1))
    assert (intervals.counts(10).sum(1) == 10).all()
