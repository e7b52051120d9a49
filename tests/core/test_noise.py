"""z: portable, keyed by name, unbiased."""

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from qzo_diffusion.core.bits import (
    _choose_by_mask,
    _sum_by_product_,
    _sum_by_table_,
    exp_pair,
    select,
    signed_sum,
)
from qzo_diffusion.core.noise import (
    Direction,
    derive_key,
    directions_of_step,
    packed_bits,
    torch_generator,
)
from qzo_diffusion.core.parametrize import parametrize
from tests.quantized import inputs, scaled_network

LIKE = torch.empty(1000)


def stacked(numel, count):
    """The bits of as many seeds, uint8 [count, bytes]."""
    return torch.from_numpy(np.stack([packed_bits(numel, seed) for seed in range(count)]))


def test_a_step_beyond_what_a_number_holds_is_infinite_and_raises_nothing():
    assert exp_pair(0.25) == (math.exp(0.25), math.exp(-0.25))
    assert exp_pair(1e30) == (math.inf, 0.0)
    assert exp_pair(-1e30) == (0.0, math.inf)


def test_bits_are_those_of_numpys_philox_lowest_bit_first():
    key = int.from_bytes(
        hashlib.blake2b(b"7\x1f3\x1f0\x1flayer", digest_size=16).digest(), "little"
    )
    words = np.random.Philox(key=key).random_raw(3)
    expected = [bool(int(words[i // 64]) >> (i % 64) & 1) for i in range(130)]
    drawn = select(
        torch.from_numpy(packed_bits(130, 7, 3, 0, "layer")), [(1.0, 0.0)], torch.float32, 0, 130
    )[0]
    assert drawn.bool().tolist() == expected


@pytest.mark.parametrize(("start", "stop"), [(0, 192), (3, 5), (8, 16), (13, 131), (64, 65)])
def test_any_range_of_bits_can_be_chosen_alone(start, stop):
    packed = stacked(192, 3)
    whole = select(packed, [(0.25, -0.5)], torch.float64)[0]
    assert whole.shape == (3, 192)
    assert whole.unique().tolist() == [-0.5, 0.25]
    both = select(packed, [(0.25, -0.5), (1.0, 2.0)], torch.float64, start, stop)
    assert torch.equal(both[0], whole[:, start:stop])
    assert torch.equal(both[1], torch.where(whole > 0, 1.0, 2.0)[:, start:stop].double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gpu_chooses_the_same_another_way(dtype):
    packed, pairs = stacked(192, 3), [(math.exp(0.01), math.exp(-0.01)), (1.0, -1.0)]
    found = torch.empty(2, *packed.shape, 8, dtype=dtype)
    _choose_by_mask(packed, pairs, found)
    assert torch.equal(found.flatten(-2), select(packed, pairs, dtype))


AMOUNTS = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=70)


@given(AMOUNTS, st.randoms(use_true_random=False))
def test_signed_sums_are_the_same_in_any_order_and_right_to_their_last_bit(amounts, order):
    packed = stacked(100, len(amounts))
    signs = select(packed, [(1.0, -1.0)], torch.float64, 0, 100)[0]
    found = signed_sum(packed, amounts, 100)
    exact = torch.tensor(amounts, dtype=torch.float64) @ signs
    # Each amount is off by at most half a unit of 2^-39 of the largest; the sum to compare with
    # rounds in float64 itself.
    largest = max(map(abs, amounts))
    torch.testing.assert_close(found, exact, rtol=0, atol=len(amounts) * largest * 2.0**-39)
    places = list(range(len(amounts)))
    order.shuffle(places)
    assert torch.equal(found, signed_sum(packed[places], [amounts[place] for place in places], 100))


@given(st.integers(1, 20), st.integers(1, 3000), st.integers(0, 2**32))
@example(2048, 20_000, 0)
def test_signed_sums_are_the_same_by_tables_and_by_products(count, numel, seed):
    packed = stacked(numel, count)
    whole = (
        np.random.default_rng(seed)
        .integers(-(2**39), 2**39, count, endpoint=True)
        .astype(float)
        .tolist()
    )
    found = torch.zeros(2, numel, dtype=torch.float64)
    _sum_by_table_(packed, whole, found[0])
    _sum_by_product_(packed, whole, found[1])
    assert torch.equal(found[0], found[1])


def test_drawing_in_threads_gives_each_its_own_bits():
    def draw(index):
        return [packed_bits(2**16, index, again).tobytes() for again in range(50)]

    alone = [draw(index) for index in range(4)]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(draw, range(4))) == alone


def test_known_bits_stay_what_they_are():
    """A journal of seeds is worthless if these ever change."""
    signs = Direction(seed=1, step=2, index=3).z("transformer_blocks.0.attn.to_q", torch.empty(16))
    assert "".join("+" if value > 0 else "-" for value in signs) == "-+--+++--+++++-+"


def test_a_longer_draw_starts_with_the_shorter_one():
    direction = Direction(0, 0)
    assert torch.equal(direction.z("a", torch.empty(70)), direction.z("a", LIKE)[:70])


@pytest.mark.parametrize("other", [Direction(1, 0, 0), Direction(0, 1, 0), Direction(0, 0, 1)])
def test_seed_step_and_index_give_other_directions(other):
    assert not torch.equal(Direction(0, 0, 0).z("a", LIKE), other.z("a", LIKE))


def test_names_give_independent_z():
    a, b = (
        Direction(0, 0).z("a", torch.empty(100_000)),
        Direction(0, 0).z("b", torch.empty(100_000)),
    )
    assert abs((a * b).mean().item()) < 5 / 100_000**0.5


def test_key_parts_cannot_run_into_each_other():
    assert derive_key(1, 12, "a") != derive_key(11, 2, "a")


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_mean_zero_and_variance_one_within_five_standard_errors(distribution):
    n = 400_000
    z = Direction(3, 5, 0, distribution).z("w", torch.empty(n, dtype=torch.float64))
    assert abs(z.mean().item()) < 5 / n**0.5
    fourth_moment_error = 2**0.5 / n**0.5 if distribution == "gaussian" else 0
    assert abs(z.square().mean().item() - 1) <= 5 * fourth_moment_error


def test_rademacher_factors_are_two_constants_in_the_scales_dtype():
    direction = Direction(0, 0)
    factors = direction.exp_z("a", LIKE, 0.01)
    expected = torch.where(
        direction.z("a", LIKE) > 0, np.float32(np.exp(0.01)), np.float32(np.exp(-0.01))
    )
    assert torch.equal(factors, expected)


def test_gaussian_factors_are_the_exponential_of_z():
    direction = Direction(0, 0, 0, "gaussian")
    assert torch.equal(direction.exp_z("a", LIKE, 0.1), torch.exp(0.1 * direction.z("a", LIKE)))


def test_a_single_number_takes_both_signs_equally_often():
    one = torch.empty(1)
    values = [
        direction.z("layer", one).item()
        for step in range(2000)
        for direction in directions_of_step(0, step, 1, "rademacher")
    ]
    assert set(values) == {-1.0, 1.0}
    assert abs(sum(values)) < 5 * 2000**0.5


def test_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    Direction(0, 0).z("a", LIKE)
    torch.randn(3, generator=torch_generator(0, 1, "data"))
    assert torch.equal(before, torch.get_rng_state())


def test_generators_of_different_purposes_differ():
    draws = [
        torch.rand(4, generator=torch_generator(0, 0, purpose))
        for purpose in ("data", "validation")
    ]
    assert not torch.equal(*draws)


@dataclass(frozen=True)
class Ones(Direction):
    distribution: str = "ones"

    def z(self, name, like, each=False):
        return torch.ones(self.patch_groups, *like.shape) if each else torch.ones_like(like)


@pytest.mark.parametrize("level", ["dense", "row", "column", "layer", "separable"])
def test_directions_of_ones_own_are_what_is_probed_and_what_is_combined(level):
    model, scales = scaled_network(dtype=torch.float64)
    theta = parametrize(scales, level)
    before = {name: live.clone() for name, live in scales.tensors().items()}
    shown = theta.perturbed(Ones(0, 0), 0.1)(list(scales))
    times = 2 if level == "separable" else 1  # a row and a column change each scale
    for name, scale in shown.items():
        torch.testing.assert_close(scale.flatten(), before[name].flatten() * math.exp(0.1 * times))
    for name, like in theta.templates().items():
        assert torch.equal(theta.combined(name, [Ones(0, 0)], [2.0]), torch.full_like(like, 2.0))
    if level != "dense":
        with scales.override(*theta.probes([Ones(0, 0), Ones(0, 1)], [0.1])), torch.no_grad():
            together = model(inputs(2, dtype=torch.float64))
        with scales.override(theta.perturbed(Ones(0, 0), 0.1)), torch.no_grad():
            torch.testing.assert_close(together, model(inputs(2, dtype=torch.float64)))


def test_a_z_of_ones_own_needs_a_name_of_its_own():
    with pytest.raises(TypeError, match="a `distribution` of its own"):

        class Nameless(Direction):
            def z(self, name, like, each=False):
                return torch.ones_like(like)
