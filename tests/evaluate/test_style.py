"""Style in features: each figure against its definition, and what it must say of sets whose answer
is known.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from qzo_diffusion.evaluate import style


def unit(seed, count, width=32, towards=None, pull=0.0):
    """Random unit features, drawn towards a point."""
    free = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return F.normalize(free if towards is None else free + pull * towards, dim=1)


POINT = F.normalize(torch.ones(32), dim=0) * 5.0


def test_kid_is_its_authors_estimate():
    """The unbiased estimate with k(x, y) = (x·y / D + 1)³, pair by pair, on features of length
    √D.
    """
    a, b = unit(0, 7), unit(1, 9)
    width = a.shape[1]
    x, y = (part.double().numpy() * np.sqrt(width) for part in (a, b))

    def kernel(first, second):
        return (first @ second / width + 1) ** 3

    own = sum(kernel(x[i], x[j]) for i in range(7) for j in range(7) if i != j) / (7 * 6)
    other = sum(kernel(y[i], y[j]) for i in range(9) for j in range(9) if i != j) / (9 * 8)
    cross = sum(kernel(x[i], y[j]) for i in range(7) for j in range(9)) / (7 * 9)
    assert style.kid(a, b) == pytest.approx(own + other - 2 * cross, rel=1e-9)


def test_kid_of_two_sets_of_one_kind_is_zero_on_average():
    found = [style.kid(unit(2 * seed, 20), unit(2 * seed + 1, 20)) for seed in range(60)]
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found)) < 4 * error
    assert style.kid(unit(0, 20), unit(1, 20, towards=POINT, pull=1.0)) > 10 * error


def test_cmmd_is_its_authors_estimate():
    """1000 · (mean k(x, x) + mean k(y, y) - 2 mean k(x, y)), diagonals included, k = exp(-|x - y|²
    / (2 · 10²)).
    """
    a, b = (part.double() for part in (unit(0, 6), unit(1, 8)))

    def mean(first, second):
        return np.mean([np.exp(-((x - y) ** 2).sum().item() / 200) for x in first for y in second])

    expected = 1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b))
    assert style.cmmd(a, b) == pytest.approx(expected, rel=1e-6)
    assert style.cmmd(a, a) == pytest.approx(0, abs=1e-9)


def test_the_same_pictures_differ_by_nothing():
    pictures, images = unit(0, 12), unit(1, 20)
    result = style.score(
        style.Pictures(pictures, pictures), images, [str(i) for i in range(20)], unit(2, 5)
    )
    assert result["similarity"]["delta"] == 0
    assert result["similarity"]["delta_ci95"] == (0, 0)
    assert result["kid"]["delta"] == 0
    assert result["kid"]["delta_ci95"] == (0, 0)
    assert result["cmmd"]["delta"] == 0


def test_pictures_that_move_to_the_style_are_seen_by_every_figure():
    images, held_out = unit(0, 30, towards=POINT, pull=1.0), unit(1, 12, towards=POINT, pull=1.0)
    base = unit(2, 25)
    tuned = unit(2, 25, towards=POINT, pull=0.7)
    result = style.score(style.Pictures(tuned, base), images, [str(i) for i in range(30)], held_out)
    assert result["similarity"]["delta_ci95"][0] > 0
    assert result["kid"]["delta_ci95"][1] < 0
    assert result["cmmd"]["delta"] < 0
    assert result["control"]["gap"] > 0
    assert result["control"]["ci95"][0] > 0
    assert result["diversity"]["tuned"] < result["diversity"]["base"]


def test_an_interval_of_kid_lies_around_its_value():
    """Resamples compare no picture with itself, so they are not raised above the estimate."""
    result = style.distances(style.Pictures(unit(0, 20)), unit(1, 20))["kid"]
    low, high = result["ci95"]
    assert low < result["value"] < high
    assert abs((low + high) / 2 - result["value"]) < 0.25 * (high - low)


def test_copies_of_training_images_are_counted():
    images, held_out = unit(0, 10), unit(1, 10)
    pictures = torch.cat([unit(2, 3), images[4:6]])
    found = style.nearest(pictures, images, [f"{i}.png" for i in range(10)], held_out)
    assert found["copies"] == 2
    assert found["max"] == pytest.approx(1, abs=1e-6)
    assert found["closest"]["image"] in ("4.png", "5.png")
    assert style.nearest(unit(3, 4), images, ["a"] * 10, held_out[:0]).keys() == {
        "mean",
        "max",
        "closest",
    }


def test_pictures_that_the_base_has_as_close_are_no_copies():
    images, held_out = unit(0, 10), unit(1, 10)
    near = F.normalize(images + 0.2 * unit(5, 10), dim=1)
    tuned, base = near[:4], F.normalize(images[5:8] + 0.1 * unit(6, 3), dim=1)
    names = [str(index) for index in range(10)]
    assert style.nearest(tuned, images, names, held_out)["copies"] == 4
    found = style.nearest(tuned, images, names, held_out, base)
    assert found["copies"] == 0
    assert found["base_max"] > found["max"] > found["held_out_max"]
    # without held-out images the base's pictures say what is usual
    assert style.nearest(images[:2], images, names, held_out[:0], base)["copies"] == 2


def test_without_held_out_images_each_is_compared_with_the_others():
    images, others = unit(0, 12, towards=POINT, pull=1.0), unit(1, 12)
    found = style.control_gap(images[:0], others, images, "others")
    assert found["ci95"][0] > 0
    assert found["held_out"] == pytest.approx(
        np.mean(
            [style.similarity(images[i : i + 1], images[np.arange(12) != i]) for i in range(12)]
        )
    )
    same = unit(2, 24)
    assert style.control_gap(same[:0], same[:12], same[12:], "others")["ci95"][0] <= 0
    assert style.control_gap(same[:0], same[:12], same[:2], "others") is None


def test_diversity_is_nothing_for_one_picture_again_and_again():
    one = unit(0, 1)
    assert style.diversity(one.expand(5, -1)) == pytest.approx(0, abs=1e-6)
    assert style.diversity(one) is None
    assert style.diversity(unit(0, 50, width=512)) == pytest.approx(1, abs=0.05)


def test_a_single_picture_has_figures_without_intervals():
    result = style.score(style.Pictures(unit(0, 1), unit(3, 1)), unit(1, 1), ["a.png"], unit(2, 0))
    assert result["kid"]["value"] is None
    assert result["similarity"]["ci95"] is None
    assert result["similarity"]["delta_ci95"] is None
    assert result["control"] is None


def test_a_run_that_began_with_another_is_credited_with_its_own_change_alone():
    images = unit(0, 30, towards=POINT, pull=1.0)
    base, begun = unit(2, 25), unit(2, 25, towards=POINT, pull=0.7)
    names = [str(index) for index in range(30)]
    idle = style.score(style.Pictures(begun, base, begun), images, names, unit(4, 0))
    for name in ("similarity", "kid", "cmmd"):
        assert idle[name]["delta"] == 0
    assert idle["similarity"]["begun_mean"] == idle["similarity"]["mean"]
    assert idle["similarity"]["base_mean"] < idle["similarity"]["mean"]
    assert idle["kid"]["base"] > idle["kid"]["begun"] == idle["kid"]["value"]
    whole = style.score(style.Pictures(begun, base), images, names, unit(4, 0))
    assert whole["similarity"]["delta"] > 0.1
