"""Directions from a subspace: each group sees its own, the mean of the estimates is the projected
gradient, and the whole space as a subspace is a plain run.
"""

import pytest
import torch

from qzo_diffusion.core.noise import directions_of_step
from qzo_diffusion.core.optimizer import Adam, Update, gradient_of
from qzo_diffusion.core.oracle import exact_gradient
from qzo_diffusion.core.parametrize import parametrize
from qzo_diffusion.quant.load import handles_of
from tests.core.test_patch_groups import EXAMPLES, REGIONS, of_regions, tokens
from tests.quantized import estimated, scaled_network

K = 5
KEYS = {"row": "0", "row.pointwise": "2"}


def directions_of(scales, k=K, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(k, scales.rows(name), generator=generator, dtype=torch.float64)
        for name in scales
    }


def in_subspace(k=K, dtype=torch.float64, **options):
    model, scales = scaled_network(dtype=dtype, **options)
    given = directions_of(scales, k)
    return model, scales, given, parametrize(scales, "row", token_wise=("2",), subspace=given)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_each_region_sees_its_own_direction_of_the_subspace(distribution):
    model, scales, _, theta = in_subspace()
    theta.move_(directions_of_step(1, 0, 1, distribution, REGIONS), [0.01] * REGIONS)
    x, drawn = tokens(), directions_of_step(0, 0, EXAMPLES, distribution, REGIONS)
    with scales.override(*theta.probes(drawn, [0.02])):
        together = model(x)
    for example, direction in enumerate(drawn):
        for region in range(REGIONS):
            other, _, _, moved = in_subspace()
            moved.load_state_(theta.state())
            amounts = [0.02 * (place == region) for place in range(REGIONS)]
            moved.move_([direction], amounts)
            moved.merge_()
            run = slice(region * 8 // REGIONS, (region + 1) * 8 // REGIONS)
            torch.testing.assert_close(
                together[example, run], other(x[example, run]), rtol=1e-12, atol=1e-12
            )


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_an_update_is_the_sum_of_drawn_coefficients_times_the_directions(distribution):
    _, _, given, theta = in_subspace()
    drawn = directions_of_step(0, 0, EXAMPLES, distribution)
    amounts = [0.3, -0.1, 0.7]
    for key, layer in KEYS.items():
        like = torch.zeros(K, dtype=torch.float64)
        coefficients = sum(a * one.z(key, like) for a, one in zip(amounts, drawn, strict=True))
        found = theta.combined(key, drawn, amounts)
        torch.testing.assert_close(found, coefficients @ given[layer], rtol=1e-10, atol=1e-10)


def test_the_mean_over_seeds_is_the_gradient_projected_on_the_subspace():
    model, _, given, theta = in_subspace(width=64, out=8, blocksize=32)
    x, count = tokens(4, width=64), 500
    exact = exact_gradient(of_regions(model, 1), [x], theta, handles_of(model))
    kept = {key: [] for key in KEYS}
    for seed in range(count):
        drawn = directions_of_step(seed, 0, 4, "rademacher", REGIONS)
        found = estimated(of_regions(model), [x], theta, drawn, eps=1e-4, per_example=True)
        for key, values in kept.items():
            update = Update(drawn, found.projected_grad, lr=1.0)
            values.append(gradient_of(theta, update, key))
    for key, layer in KEYS.items():
        b, stacked = given[layer], torch.stack(kept[key])
        deviation = (stacked.mean(0) - b.T @ (b @ exact[key])).abs()
        assert (deviation / (stacked.std(0) / count**0.5)).max() < 5, key


def test_unit_directions_are_the_whole_space():
    """Signs are drawn alike, so that probes and updates are the same numbers."""
    model, scales = scaled_network(width=64, out=64)
    unit = {name: torch.eye(64) for name in scales}
    plain = parametrize(scales, "row", token_wise=("2",))
    found = parametrize(scales, "row", token_wise=("2",), subspace=unit)
    drawn, amounts = directions_of_step(3, 0, 2, "rademacher", REGIONS), [0.25] * 2 * REGIONS
    for theta in (plain, found):
        theta.move_(drawn, amounts)
    for key in plain.templates():
        assert torch.equal(found.by_axis[key], plain.by_axis[key])
    x, outputs = tokens(2, 64, torch.float32), []
    for theta in (plain, found):
        with scales.override(*theta.probes(drawn, [0.02, -0.02])):
            outputs.append(model(torch.cat([x, x])))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("level", "change", "message"),
    [
        ("separable", dict, "a subspace of rows for row and column"),
        ("row", lambda given: {"2": given["2"]}, "0: directions None for 128 rows"),
        ("row", lambda given: given | {"2": given["2"][:, 1:]}, r"\(5, 7\) for 8 rows"),
        ("row", lambda given: given | {"2": given["2"][0]}, r"\(8,\) for 8 rows"),
        ("row", lambda given: given | {"2": given["2"][1:]}, r"\[4, 5\] directions"),
    ],
)
def test_another_shape_is_refused(level, change, message):
    _, scales = scaled_network(dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        parametrize(scales, level, subspace=change(directions_of(scales)))


def test_adam_keeps_a_square_of_each_number():
    """A sum over directions of unequal size has no one square, as a single vector of signs has."""
    _, _, _, theta = in_subspace()
    adam = Adam()
    adam.step_(theta, Update(directions_of_step(0, 0, 1, "rademacher"), (0.5,), 0.01))
    seconds = {name: one for name, one in adam.state().items() if name.startswith("second.")}
    assert seconds
    assert all(len(one.unique()) > 1 for one in seconds.values())
