import itertools
import math
import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qzo_diffusion.train.batch_plan import BatchPlan

Bucket = tuple[int, int]
SQUARE, WIDE, TALL = (64, 64), (80, 48), (48, 80)
plans = st.builds(
    lambda buckets, batch_size, seed, repeats: (
        list(enumerate(buckets)),
        batch_size,
        seed,
        repeats,
    ),
    st.lists(st.sampled_from([SQUARE, WIDE, TALL]), min_size=1, max_size=30),
    st.integers(1, 8),
    st.integers(-(2**70), 2**70),
    st.integers(1, 3),
)


@settings(deadline=None)
@given(plans)
def test_every_epoch_holds_everything(
    plan_of: tuple[list[tuple[int, Bucket]], int, int, int],
) -> None:
    items, batch_size, seed, repeats = plan_of
    plan = BatchPlan(items, batch_size=batch_size, seed=seed, repeats=repeats)
    bucket_of, sizes = dict(items), Counter(bucket for _, bucket in items)
    for epoch in (0, 1, 7):
        first = epoch * plan.steps_per_epoch
        batches = [plan.batch(step) for step in range(first, first + plan.steps_per_epoch)]
        assert all(len(batch) == batch_size for batch in batches)
        assert all(len({bucket_of[index] for index in batch}) == 1 for batch in batches)
        drawn = Counter(index for batch in batches for index in batch)
        for bucket, size in sizes.items():
            counts = [drawn[index] for index, own in items if own == bucket]
            # Exactly `repeats` each, plus what fills the last batch of the bucket.
            assert min(counts) >= repeats
            assert sum(counts) == math.ceil(size * repeats / batch_size) * batch_size
            if size * repeats % batch_size == 0:
                assert set(counts) == {repeats}


@settings(deadline=None, max_examples=50)
@given(plans, st.lists(st.integers(0, 60), min_size=1, max_size=10))
def test_any_step_may_be_asked_for_at_any_time(
    plan_of: tuple[list[tuple[int, Bucket]], int, int, int], steps: list[int]
) -> None:
    items, batch_size, seed, repeats = plan_of
    straight = BatchPlan(items, batch_size=batch_size, seed=seed, repeats=repeats)
    in_order = [straight.batch(step) for step in range(max(steps) + 1)]
    resumed = BatchPlan(items, batch_size=batch_size, seed=seed, repeats=repeats)
    assert [resumed.batch(step) for step in steps] == [in_order[step] for step in steps]


def test_one_image_works_and_fills_the_batch() -> None:
    plan = BatchPlan([(7, SQUARE)], batch_size=4, seed=0)
    assert plan.steps_per_epoch == 1
    assert [plan.batch(step) for step in (0, 1, 10**12)] == [[7, 7, 7, 7]] * 3


def test_repeats_one_means_once() -> None:
    items = [(index, SQUARE) for index in range(8)]
    assert BatchPlan(items, batch_size=4, seed=0).steps_per_epoch == 2
    assert BatchPlan(items, batch_size=4, seed=0, repeats=3).steps_per_epoch == 6


def test_orders_differ_between_epochs_and_seeds_and_mix_buckets() -> None:
    items = [(index, SQUARE if index < 30 else WIDE) for index in range(60)]
    plan = BatchPlan(items, batch_size=3, seed=0)
    first, second = plan.epoch(0), plan.epoch(1)
    other = BatchPlan(items, batch_size=3, seed=1).epoch(0)
    assert first != second
    assert first != other
    wide_batches = [batch[0] >= 30 for batch in first]
    assert sum(a != b for a, b in itertools.pairwise(wide_batches)) > 2


def test_neighbouring_seeds_differ_even_when_negative_or_huge() -> None:
    items = [(index, SQUARE) for index in range(30)]
    for seed in (-2, 2**63 - 1, 2**63 + 5):
        one, two = (BatchPlan(items, batch_size=30, seed=s).batch(0) for s in (seed, seed + 1))
        assert one != two


def test_the_first_place_is_uniform() -> None:
    plan = BatchPlan([(index, SQUARE) for index in range(4)], batch_size=1, seed=0)
    counts = Counter(plan.epoch(epoch)[0][0] for epoch in range(2000))
    # Multinomial: a standard error of sqrt(2000 * 1/4 * 3/4) = 19.4; five of them.
    assert all(abs(counts[index] - 500) < 97 for index in range(4))


def test_the_order_is_the_same_on_every_machine_and_version() -> None:
    # Written down once: a resumed run with a newer numpy must not see other batches.
    plan = BatchPlan([(index, SQUARE) for index in range(8)], batch_size=4, seed=123)
    assert [plan.batch(step) for step in (0, 1, 2)] == [[4, 7, 0, 6], [5, 1, 3, 2], [2, 7, 0, 3]]


def test_the_global_random_state_is_left_alone() -> None:
    before = pickle.dumps(np.random.get_state())
    BatchPlan([(0, SQUARE)], batch_size=1, seed=0).batch(0)
    assert pickle.dumps(np.random.get_state()) == before


def test_a_batch_that_is_changed_by_its_owner_does_not_change_the_plan() -> None:
    plan = BatchPlan([(0, SQUARE), (1, SQUARE)], batch_size=2, seed=0)
    plan.batch(0).clear()
    assert len(plan.batch(0)) == 2


@pytest.mark.parametrize(
    ("items", "batch_size", "repeats"), [([], 1, 1), ([(0, SQUARE)], 0, 1), ([(0, SQUARE)], 1, 0)]
)
def test_nonsense_is_refused(
    items: list[tuple[int, Bucket]], batch_size: int, repeats: int
) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        BatchPlan(items, batch_size=batch_size, seed=0, repeats=repeats)
