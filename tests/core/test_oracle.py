"""The exact gradient against finite differences, and the estimate against the exact gradient."""

import pytest
import torch

from qzo_diffusion.core.noise import Direction, directions_of_step
from qzo_diffusion.core.oracle import alignment, exact_gradient
from qzo_diffusion.core.parametrize import parametrize
from qzo_diffusion.core.spsa import mean_loss
from qzo_diffusion.quant.load import handles_of
from tests.quantized import assert_same, estimated, inputs, scaled_network, snapshot, squared_output

LEVELS = ["dense", "row", "column", "layer", "separable"]


@pytest.mark.parametrize("level", LEVELS)
def test_it_is_the_slope_of_the_loss_along_any_direction(level):
    model, scales = scaled_network(dtype=torch.float64, width=64, blocksize=32)
    theta = parametrize(scales, level)
    theta.move_([Direction(1, 1)], [0.1])
    objective, x = squared_output(model), inputs(4, width=64, dtype=torch.float64)
    gradient = exact_gradient(objective, list(x.split(3)), theta, handles_of(model))
    direction = Direction(0, 0)
    along = sum(
        (gradient[name] * theta.combined(name, [direction], [1.0])).sum().item()
        for name in gradient
    )
    losses = []
    for radius in (1e-5, -1e-5):
        with scales.override(theta.perturbed(direction, radius)):
            losses.append(mean_loss(objective, [x]))
    assert along == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-6)


def test_losses_of_regions_are_those_of_their_example():
    model, scales = scaled_network()
    theta, objective, x = parametrize(scales, "row"), squared_output(model), inputs(4)

    def of_regions(batch):  # their mean is the example's loss
        return objective(batch).unsqueeze(1) * torch.tensor([0.5, 1.5])

    one, other = (
        exact_gradient(loss, [x], theta, handles_of(model))["row"]
        for loss in (objective, of_regions)
    )
    torch.testing.assert_close(other, one)


@pytest.mark.parametrize("backend", ["reference", "bnb"])
def test_the_model_is_what_it_was(backend):
    model, scales = scaled_network(backend)
    before, plain = snapshot(model, scales), model(inputs())
    exact_gradient(squared_output(model), [inputs()], parametrize(scales, "row"), handles_of(model))
    assert_same(before, snapshot(model, scales))
    assert torch.equal(plain, model(inputs()))


def test_both_backends_give_the_same_gradient():
    found = []
    for backend in ("reference", "bnb"):
        model, scales = scaled_network(backend)
        found.append(
            exact_gradient(
                squared_output(model), [inputs()], parametrize(scales, "row"), handles_of(model)
            )["row"]
        )
    # Sums of 128 products in another order, each good to 2^-24 of the largest.
    torch.testing.assert_close(*found, rtol=0, atol=128 * 2**-24 * found[0].abs().max().item())


def test_the_cosine_of_an_estimate_is_what_its_directions_allow():
    model, scales = scaled_network(dtype=torch.float64)
    theta, objective, x = (
        parametrize(scales, "row"),
        squared_output(model),
        inputs(1, dtype=torch.float64),
    )
    exact = exact_gradient(objective, [x], theta, handles_of(model))
    cosines = []
    for seed in range(40):
        found = estimated(
            objective, [x], theta, directions_of_step(seed, 0, 16, "rademacher"), eps=1e-3
        )
        cosines.append(alignment(theta, found, exact).cosine)
    assert sum(cosines) / 40 == pytest.approx(
        (16 / (16 + 136)) ** 0.5, abs=5 * torch.tensor(cosines).std().item() / 40**0.5 + 0.02
    )
