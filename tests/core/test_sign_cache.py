"""Signs are drawn once a step, and are those that a draw gives."""

import numpy as np
import pytest
import torch

from qzo_diffusion.core.noise import Direction, directions_of_step
from qzo_diffusion.core.sign_cache import SignCache

CPU = torch.device("cpu")


def directions(count, step=0, patch_groups=1):
    return directions_of_step(0, step, count, "rademacher", patch_groups)


def draw(name, each=False):
    return lambda direction: direction.packed(name, 200, each)


def drawn(directions, name, each=False):
    return np.stack([draw(name, each)(direction) for direction in directions])


@pytest.fixture
def draws(monkeypatch):
    """What was drawn: (step, index, name)."""
    found, plain = [], Direction.packed

    def counting(self, name, numel, each=False):
        found.append((self.step, self.index, name))
        return plain(self, name, numel, each)

    monkeypatch.setattr(Direction, "packed", counting)
    return found


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("limit", [100, 2**25])  # a direction takes 32 bytes here, with `each` 96
def test_cached_bits_are_the_drawn_ones(limit, each):
    cache, all_six = SignCache(limit), directions(6, patch_groups=3)
    for asked in (all_six[:2], all_six[2:5], all_six[:2], all_six, all_six[4:]):
        for name in ("a", "b"):
            for keep in (True, False):
                assert np.array_equal(
                    cache.packed(asked, name, draw(name, each), CPU, keep).numpy(),
                    drawn(asked, name, each),
                )


def test_an_update_over_several_forwards_draws_nothing_again(draws):
    cache, both = SignCache(), directions(4)
    for forward in (both[:2], both[2:]):
        for _ in range(3):
            for name in ("a", "b"):
                cache.packed(forward, name, draw(name), CPU)
    assert len(draws) == len(set(draws)) == 8
    cache.packed(both, "a", draw("a"), CPU, keep=False)
    assert len(draws) == 8


def test_directions_in_use_stay_and_older_ones_go(draws):
    cache = SignCache(limit=100)
    for forward in (directions(4)[:2], directions(4)[2:]):
        for _ in range(2):
            for name in ("a", "b", "c"):
                cache.packed(forward, name, draw(name), CPU)
    assert len(draws) == len(set(draws)) == 12  # 192 bytes for a forward
    cache.packed(directions(4), "a", draw("a"), CPU, keep=False)
    assert draws[12:] == [(0, 0, "a"), (0, 1, "a")]


def test_bits_of_another_step_are_not_kept(draws):
    """A long run would otherwise hold those of a hundred steps."""
    cache = SignCache()
    for step in (0, 1, 0):
        cache.packed(directions(1, step), "a", draw("a"), CPU)
    assert draws == [(0, 0, "a"), (1, 0, "a"), (0, 0, "a")]
    assert cache._bytes == 32
