"""Which step is best, and when a run ends before its last step."""

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qzo_diffusion.train.stopping import Limits, best_step, validations_since_best

LOSSES = st.lists(st.floats(0, 10) | st.just(math.nan), max_size=12)


@given(LOSSES, st.integers(1, 12))
def test_patience_counts_as_a_loop_over_the_losses_would(losses, patience):
    best, bad, ended = math.inf, 0, False
    for loss in losses:
        bad = 0 if loss < best else bad + 1
        best = loss if loss < best else best
        ended = bad >= patience  # after the last loss alone
    of_step = {10 * place: loss for place, loss in enumerate(losses)}
    assert (Limits(patience=patience).reached(of_step) == "patience") == ended


@given(LOSSES)
def test_the_best_step_is_the_first_with_the_lowest_loss(losses):
    numbers = [loss for loss in losses if not math.isnan(loss)]
    expected = losses.index(min(numbers)) if numbers else None
    assert best_step(dict(enumerate(losses))) == expected


def test_the_order_of_the_losses_does_not_matter():
    assert validations_since_best({30: 3.0, 10: 1.0, 20: 2.0}) == 2


@pytest.mark.parametrize(("seconds", "reason"), [(-1, "time"), (1000, None)])
def test_time_is_up_at_the_deadline(seconds, reason):
    assert Limits(deadline=time.monotonic() + seconds).reached({}) == reason


def test_without_limits_nothing_ends():
    assert Limits().reached({step: float(step) for step in range(100)}) is None
