"""Regions of an example with directions of their own: each sees its own z, the mean is the
gradient, the variance falls.
"""

import pytest
import torch
from torch import nn

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.core.noise import Direction, directions_of_step
from qzo_diffusion.core.optimizer import Update, gradient_of
from qzo_diffusion.core.oracle import exact_gradient
from qzo_diffusion.core.parametrize import parametrize
from qzo_diffusion.core.spsa import rms
from qzo_diffusion.quant.load import handles_of
from tests.core.seeds import averaged_over
from tests.quantized import assert_same, estimated, inputs, scaled_network, snapshot

EXAMPLES, TOKENS, REGIONS = 3, 8, 4
LEVELS = ["row", "column", "separable", "layer"]


def tokens(count=EXAMPLES, width=128, dtype=torch.float64):
    return inputs(count * TOKENS, width, dtype).view(count, TOKENS, width)


def of_regions(model: nn.Module, patch_groups=REGIONS):
    """An objective that treats tokens apart: a loss for each run of them, [B, R]."""
    return lambda x: model(x).square().mean(-1).view(len(x), patch_groups, -1).mean(-1)


def network_of_tokens(level, token_wise=("0", "2"), **options):
    model, scales = scaled_network(dtype=torch.float64, **options)
    return model, scales, parametrize(scales, level, token_wise=token_wise)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
@pytest.mark.parametrize("level", LEVELS)
def test_each_region_sees_what_its_own_z_does_to_the_scales(level, distribution):
    model, scales, theta = network_of_tokens(level)
    x, directions = tokens(), directions_of_step(0, 0, EXAMPLES, distribution, REGIONS)
    with scales.override(*theta.probes(directions, [0.02])):
        together = model(x)
    for example, direction in enumerate(directions):
        for region in range(REGIONS):
            amounts = [0.02 * (place == region) for place in range(REGIONS)]
            other, _, moved = network_of_tokens(level)
            moved.move_([direction], amounts)
            moved.merge_()
            run = slice(region * TOKENS // REGIONS, (region + 1) * TOKENS // REGIONS)
            torch.testing.assert_close(
                together[example, run], other(x[example, run]), rtol=1e-12, atol=1e-12
            )


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("count", "patch_groups", "viewed", "gained"),
    [(1, 2, {"0"}, {"2"}), (2, 2, set(), {"0", "2"}), (1, 1, {"0", "2"}, set())],
)
def test_what_all_examples_share_is_shown_as_scales_and_theta_goes_with_its_z(
    level, count, patch_groups, viewed, gained
):
    """These layers have more scales than factors; pointwise is layer "2"."""
    model, scales, theta = network_of_tokens(level, ("2",), width=512, out=512)
    theta.move_(directions_of_step(1, 0, 1, "rademacher", patch_groups), [0.1] * patch_groups)
    directions = directions_of_step(0, 0, count, "rademacher", patch_groups)
    view, scaling = theta.probes(directions, [0.02])
    assert set(view(["0", "2"]) if view else ()) == viewed
    assert set(scaling(["0", "2"]) if scaling else ()) == gained
    with scales.override(view, scaling):
        found = model(tokens(count, 512))
    theta._scales_of = dict.fromkeys(theta._scales_of, 0)  # then θ stays where it was
    view, scaling = theta.probes(directions, [0.02])
    assert set(view(["0", "2"])) == viewed | gained
    with scales.override(view, scaling):
        torch.testing.assert_close(found, model(tokens(count, 512)), rtol=1e-10, atol=1e-10)


@averaged_over(150, 600)
@pytest.mark.parametrize("token_wise", [("0", "2"), ("2",)])
def test_the_mean_over_seeds_is_the_gradient_where_tokens_do_not_meet(token_wise, seeds):
    model, _, theta = network_of_tokens("separable", token_wise, width=64, out=2, blocksize=32)
    x = tokens(4, width=64)
    exact = exact_gradient(of_regions(model, 1), [x], theta, handles_of(model))
    drawn = {name: [] for name in exact}
    for seed in range(seeds):
        directions = directions_of_step(seed, 0, 4, "rademacher", REGIONS)
        found = estimated(
            of_regions(model), list(x.split(3)), theta, directions, eps=1e-3, per_example=True
        )
        for name, kept in drawn.items():
            kept.append(gradient_of(theta, Update(directions, found.projected_grad, lr=1.0), name))
    for name, values in drawn.items():
        stacked = torch.stack(values)
        deviation = (stacked.mean(0) - exact[name]).abs() / (stacked.std(0) / seeds**0.5)
        assert deviation.max() < 5, name


def test_it_has_less_variance_than_a_direction_for_each_example():
    model, _, theta = network_of_tokens("row")
    x, of_one, of_many = tokens(4), [], []
    for seed in range(60):
        for kept, patch_groups in ((of_one, 1), (of_many, REGIONS)):
            directions = directions_of_step(seed, 0, 4, "rademacher", patch_groups)
            found = estimated(
                of_regions(model, patch_groups), [x], theta, directions, eps=1e-3, per_example=True
            )
            kept.append(
                gradient_of(
                    theta, Update(directions, found.projected_grad, lr=1.0), "row.pointwise"
                )
            )
    ratio = torch.stack(of_one).var(0).sum() / torch.stack(of_many).var(0).sum()
    # regions · |gradient of an example|² / mean |gradient of a region|², which is less than 4
    assert ratio > 2


def test_both_signs_in_one_forward_are_what_two_forwards_give():
    model, _, theta = network_of_tokens("separable", ("2",))
    x, directions = tokens(), directions_of_step(0, 0, EXAMPLES, "rademacher", REGIONS)
    together, apart = (
        estimated(
            of_regions(model),
            [x],
            theta,
            directions,
            eps=1e-2,
            per_example=True,
            probes_per_forward=probes_per_forward,
        )
        for probes_per_forward in (None, 1)
    )
    assert len(together.projected_grad) == EXAMPLES * REGIONS
    assert together.loss_plus == pytest.approx(apart.loss_plus, rel=1e-12)
    assert together.loss_minus == pytest.approx(apart.loss_minus, rel=1e-12)


def test_whole_numbers_move_by_what_all_regions_say_together():
    _, _, theta = network_of_tokens("row", ("2",))
    direction = Direction(0, 0, patch_groups=REGIONS)
    moved = theta.combined("row", [direction], [0.1, 0.2, 0.3, 0.4])
    assert torch.equal(
        moved, torch.tensor(1.0, dtype=torch.float64) * Direction(0, 0).z("row", moved)
    )
    of_region = direction.z("row.pointwise", theta.by_axis["row.pointwise"], each=True)
    assert torch.equal(theta.combined("row.pointwise", [direction], [0, 0, 1, 0]), of_region[2])
    assert len({tuple(row.tolist()) for row in of_region}) == REGIONS


def test_one_region_is_the_estimate_without_regions_on_whole_numbers():
    model, _, theta = network_of_tokens("row", ())
    x, directions = tokens(), directions_of_step(0, 0, EXAMPLES, "rademacher")
    found = estimated(of_regions(model, 1), [x], theta, directions, eps=1e-2, per_example=True)
    same = estimated(
        lambda x: model(x).square().mean((1, 2)),
        [x],
        theta,
        directions,
        eps=1e-2,
        per_example=True,
    )
    assert found.directional_derivative == pytest.approx(same.directional_derivative, rel=1e-12)


def test_normalised_derivatives_have_a_spread_of_one_and_keep_their_ratios():
    model, _, theta = network_of_tokens("row", ("2",))
    x, directions = tokens(), directions_of_step(0, 0, EXAMPLES, "rademacher", REGIONS)
    plain, normal = (
        estimated(
            of_regions(model),
            [x],
            theta,
            directions,
            eps=1e-2,
            per_example=True,
            normalize=wanted,
        )
        for wanted in (False, True)
    )
    assert rms(normal.projected_grad, REGIONS) == pytest.approx(1)
    unit = rms(plain.directional_derivative, REGIONS)
    assert [g * unit for g in normal.projected_grad] == pytest.approx(list(plain.projected_grad))
    assert not any(normal.clipped)
    assert rms([3.0, -4.0]) == pytest.approx((25 / 2) ** 0.5)
    assert rms([3.0, -3.0], 2) == 0


def test_no_slope_at_all_moves_nothing_and_stays_finite():
    _, _, theta = network_of_tokens("row", ("2",))
    directions = directions_of_step(0, 0, EXAMPLES, "rademacher", REGIONS)
    flat = estimated(
        lambda x: torch.ones(len(x), REGIONS),
        [tokens()],
        theta,
        directions,
        eps=1e-2,
        per_example=True,
        normalize=True,
    )
    assert flat.finite
    assert set(flat.projected_grad) == {0.0}


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_nothing_changes_whatever_happens(error):
    model, scales = scaled_network("bnb")
    theta, x = parametrize(scales, "separable", token_wise=("0",)), tokens(dtype=torch.float32)
    before, plain = snapshot(model, scales), model(x)

    def broken(x):
        model(x)
        raise error

    with pytest.raises(type(error)):
        estimated(
            broken,
            [x],
            theta,
            directions_of_step(0, 0, 3, "rademacher", REGIONS),
            eps=1e-2,
            per_example=True,
        )
    assert_same(before, snapshot(model, scales))
    assert torch.equal(plain, model(x))


def test_what_does_not_fit_is_refused():
    model, scales, theta = network_of_tokens("row")
    directions = directions_of_step(0, 0, EXAMPLES, "rademacher", 3)
    with (
        pytest.raises(ModelError, match="8 tokens"),
        scales.override(*theta.probes(directions, [0.01])),
    ):
        model(tokens())
    directions = directions_of_step(0, 0, EXAMPLES, "rademacher", REGIONS)
    with pytest.raises(ValueError, match="3 losses for 3 examples of 4 patch groups"):
        estimated(of_regions(model, 1), [tokens()], theta, directions, eps=1e-2, per_example=True)
    with pytest.raises(ValueError, match="only where examples have"):
        estimated(of_regions(model), [tokens()], theta, directions[:1], eps=1e-2)
    with pytest.raises(ValueError, match="not 4 patch groups"):
        theta.perturbed(directions[0], 0.01)(["0"])
