"""Codes along factors of rows and columns: rounding against its definition, probes against weights
in floating point.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from qzo_diffusion.core import rounded_codes
from qzo_diffusion.core.noise import Direction, directions_of_step
from qzo_diffusion.core.parametrization import tuned_scales
from qzo_diffusion.core.parametrize import parametrize
from qzo_diffusion.core.rounded_codes import RoundedCodes
from qzo_diffusion.core.stored import Axis
from qzo_diffusion.quant.load import find_codes
from tests.quantized import assert_same, estimated, inputs, network, snapshot, squared_output

KINDS = ["int8", "int4", "fp8"]
BLOCK = 32


def factors_of_codes(kind, level="separable", **options):
    model = network("intgrid", kind, BLOCK, **options)
    scales, grids = find_codes(model)
    return model, grids, parametrize(scales, level, stored=RoundedCodes(scales, grids, BLOCK))


def numbers_at(theta, grids, name, direction=None, radius=0.0):
    """c0 · exp(θ + radius · z) in units of the scale, fp32 [N, K], not rounded."""

    def factor(axis: Axis):
        key_theta = theta.of_layer(axis, name)
        if direction is None:
            return key_theta.exp()
        place = theta.place(axis, name)
        return (key_theta + radius * direction.z(axis, theta.by_axis[axis])[place]).exp()

    grid = grids[name]
    row, column = factor("row"), factor("column")
    numbers = grid.values(grid.codes(theta.scales[name]))
    return numbers * row[:, None] * column.repeat_interleave(BLOCK)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_at_zero_are_those_of_the_base(kind):
    _, _, theta = factors_of_codes(kind)
    tuned = tuned_scales(theta)
    assert all(torch.equal(tuned[name], live) for name, live in theta.scales.tensors().items())


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_takes_a_neighbour_is_right_on_average_and_stays_in_the_range(kind, monkeypatch):
    monkeypatch.setattr(rounded_codes, "BLOCK", 2048)  # several parts a layer
    _, grids, theta = factors_of_codes(kind, width=512)
    theta.move_([Direction(0, 0)], [0.2])
    grid, wanted = grids["0"], numbers_at(theta, grids, "0")
    codes = grid.codes(tuned_scales(theta)["0"])
    outside = wanted.abs() >= grid.largest
    assert outside.any()
    limits = torch.where(wanted > 0, float(grid.high), float(grid.low))
    assert torch.equal(codes[outside], limits[outside])
    error = (codes - grid.places(wanted))[~outside].double()
    assert error.abs().max() < 1
    # bytes of dither leave 2^-9 of a code
    assert abs(error.mean()) < 5 * error.std() / math.sqrt(error.numel()) + 2**-9
    moved = (wanted / grid.values(grid.codes(theta.scales["0"])))[~outside].double() > 1
    for side in (moved, ~moved):
        part = (error * wanted.sign()[~outside])[side]
        assert abs(part.mean()) < 5 * part.std() / math.sqrt(part.numel()) + 2**-9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 3])
def test_each_example_sees_its_direction_without_rounding(kind, count):
    model, grids, theta = factors_of_codes(kind, "separable")
    before = snapshot(model, theta.scales)
    theta.move_([Direction(9, 0)], [0.05])
    x, directions = inputs(count), directions_of_step(0, 0, count, "rademacher")
    with torch.no_grad(), theta.scales.override(*theta.probes(directions, [0.02])):
        together = model(x)
    for index, direction in enumerate(directions):
        hidden = x[index]
        for name in ("0", "2"):
            layer = model.get_submodule(name)
            numbers = numbers_at(theta, grids, name, direction, 0.02)
            scale = (layer.scales / layer.grid.largest).view(layer.out_features, -1)
            weight = numbers * scale.repeat_interleave(numbers.shape[1] // scale.shape[1], 1)
            hidden = F.linear(hidden, weight, layer.bias)
            hidden = hidden.tanh() if name == "0" else hidden
        # two layers of products of 128 terms and a handful of single roundings, each 2^-24
        allowed = 4 * 128 * 2**-24 * hidden.abs().max().item()
        torch.testing.assert_close(together[index], hidden, rtol=0, atol=allowed)
    assert_same(before, snapshot(model, theta.scales))


def test_the_estimate_is_the_gradient_on_average():
    model, _, theta = factors_of_codes("int8")
    theta.move_([Direction(9, 0)], [0.05])
    x = inputs(4)
    directions = directions_of_step(1, 0, 4 * 2000, "rademacher")
    found = estimated(squared_output(model), [x], theta, directions, eps=1e-2, per_example=True)
    slopes = torch.tensor(found.directional_derivative, dtype=torch.float64)
    for axis, place in (("row", 3), ("column", 1)):
        signs = torch.tensor([d.z(axis, theta.by_axis[axis])[place].item() for d in directions])
        products = slopes * signs
        one = torch.zeros_like(theta.by_axis[axis])
        one[place] = 1
        ends = []
        for radius in (1e-2, -1e-2):
            theta.add_(axis, radius * one)
            with torch.no_grad(), theta.scales.override(*theta.probes([Direction(0, 0)], [0.0])):
                ends.append(model(x).square().mean().item())
            theta.add_(axis, -radius * one)
        slope = (ends[0] - ends[1]) / 2e-2
        assert products.mean().item() == pytest.approx(
            slope, abs=5 * products.std().item() / math.sqrt(len(products)) + 1e-6
        )
        assert abs(slope) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_merged_codes_are_the_tuned_ones(kind):
    model, _, theta = factors_of_codes(kind)
    theta.move_([Direction(9, 0)], [0.1])
    tuned = {name: codes.clone() for name, codes in tuned_scales(theta).items()}
    with torch.no_grad(), theta.scales.override(theta.perturbed()):
        seen = model(inputs())
    theta.merge_()
    assert all(torch.equal(theta.scales[name], codes) for name, codes in tuned.items())
    assert torch.equal(model(inputs()), seen)
    assert not any(one.any() for one in theta.by_axis.values())


def test_blocks_that_do_not_divide_the_inputs_become_smaller():
    model = network("intgrid", "int8", width=96)
    scales, grids = find_codes(model)
    assert RoundedCodes(scales, grids, 64).columns("0") == 3
