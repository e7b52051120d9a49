"""A direction of its own for every example: the same numbers as one example at a time, and the gradient on average."""

import pytest
import torch

from qzo_diffusion.core.noise import Direction, directions_of_step
from qzo_diffusion.core.parametrize import parametrize
from qzo_diffusion.core.scales import apply_gain
from qzo_diffusion.core.spsa import estimate, estimate_per_example
from tests.quantized import assert_same, inputs, scaled_network, snapshot, squared_output


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
@pytest.mark.parametrize("level", ["row", "layer"])
@pytest.mark.parametrize("backend", ["reference", "bnb"])
def test_each_example_sees_what_its_direction_does_to_the_scales(backend, level, distribution):
    model, scales = scaled_network(backend)
    numbers = parametrize(scales, level)
    numbers.move_([Direction(9, 0)], [0.05])
    x = inputs(4)
    directions = directions_of_step(0, 0, 4, distribution)
    with torch.no_grad():
        with scales.showing(numbers.view(), numbers.gain(directions, 0.02)):
            together = model(x)
        for index, direction in enumerate(directions):
            with scales.showing(numbers.view(direction, 0.02)):
                alone = model(x[index : index + 1])
            # Two layers of products of 128 terms and a handful of single roundings, each 2^-24 of the largest output.
            torch.testing.assert_close(together[index : index + 1], alone, rtol=0, atol=4 * 128 * 2**-24 * alone.abs().max().item())


@pytest.mark.parametrize("level", ["row", "layer"])
def test_derivatives_are_those_of_the_examples_one_at_a_time(level):
    model, scales = scaled_network(dtype=torch.float64)
    numbers = parametrize(scales, level)
    x, directions = inputs(5, dtype=torch.float64), directions_of_step(0, 0, 5, "rademacher")
    found = estimate_per_example(squared_output(model), list(x.split(2)), numbers, directions, eps=1e-2)
    for index, direction in enumerate(directions):
        single = estimate(squared_output(model), [x[index : index + 1]], numbers, [direction], eps=1e-2)
        assert found.directional_derivative[index] == pytest.approx(single.directional_derivative[0], rel=1e-9)


@pytest.mark.parametrize("level", ["row", "layer"])
def test_the_mean_over_seeds_is_the_gradient(level):
    model, scales = scaled_network(width=64, out=2, dtype=torch.float64)
    numbers = parametrize(scales, level)
    x = inputs(8, width=64, dtype=torch.float64)
    exact = {}
    layers = {name: model.get_submodule(name) for name in scales}
    for name, layer in layers.items():
        live = layer.absmax
        layer.absmax = live.clone().requires_grad_()
        squared_output(model)(x).mean().backward()
        exact[name] = (layer.absmax.grad * live).view(numbers.theta[name].numel(), -1).sum(1)
        layer.absmax = live
    samples = {name: [] for name in scales}
    for seed in range(600):
        directions = directions_of_step(seed, 0, 8, "rademacher")
        found = estimate_per_example(squared_output(model), [x], numbers, directions, eps=1e-3)
        for name in scales:
            terms = [d * one.z(name, numbers.theta[name]) for d, one in zip(found.directional_derivative, directions, strict=True)]
            samples[name].append(torch.stack(terms).mean(0))
    for name in scales:
        stacked = torch.stack(samples[name])
        deviation = (stacked.mean(0) - exact[name]).abs() / (stacked.std(0) / 600**0.5)
        assert deviation.max() < 5, name


def test_it_has_less_variance_than_one_shared_direction():
    model, scales = scaled_network(dtype=torch.float64)
    numbers = parametrize(scales, "row")
    x = inputs(16, dtype=torch.float64)
    shared, own = [], []
    for seed in range(60):
        one = estimate(squared_output(model), [x], numbers, [Direction(seed, 0)], eps=1e-3)
        shared.append(one.directional_derivative[0] * one.directions[0].z("0", numbers.theta["0"]))
        many = estimate_per_example(squared_output(model), [x], numbers, directions_of_step(seed, 0, 16, "rademacher"), eps=1e-3)
        pairs = zip(many.directional_derivative, many.directions, strict=True)
        own.append(torch.stack([d * direction.z("0", numbers.theta["0"]) for d, direction in pairs]).mean(0))
    ratio = torch.stack(shared).var(0).sum() / torch.stack(own).var(0).sum()
    assert ratio > 4


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_nothing_changes_and_no_factor_stays(error):
    model, scales = scaled_network("bnb")
    numbers = parametrize(scales, "row")
    before, plain = snapshot(model, scales), model(inputs())

    def broken(x):
        model(x)
        raise error

    with pytest.raises(type(error)):
        estimate_per_example(broken, [inputs()], numbers, directions_of_step(0, 0, 6, "rademacher"), eps=1e-2)
    assert_same(before, snapshot(model, scales))
    assert torch.equal(plain, model(inputs()))


def test_dense_numbers_have_no_factor_of_outputs():
    _, scales = scaled_network()
    with pytest.raises(ValueError, match="rows or layers"):
        parametrize(scales, "dense").gain([Direction(0, 0)], 1e-2)


@pytest.mark.parametrize("shape", [(3, 8), (3, 5, 8), (3, 2, 5, 8)])
def test_gain_leaves_the_bias_alone_in_any_shape(shape):
    generator = torch.Generator().manual_seed(0)
    product, bias = torch.randn(shape, generator=generator), torch.randn(8, generator=generator)
    gain = torch.rand(3, 8, generator=generator)
    expected = product * gain.view(3, *(1,) * (len(shape) - 2), 8) + bias
    torch.testing.assert_close(apply_gain(product + bias, gain, bias), expected)


def test_a_small_gain_is_not_lost_in_bfloat16():
    """1.01 alone rounds to 1.0078 there; the product is formed in fp32 and rounded once."""
    value, gain = torch.tensor([[1.9921875]], dtype=torch.bfloat16), torch.tensor([[1.01]])
    scaled = apply_gain(value, gain, None)
    assert scaled.dtype == torch.bfloat16
    assert torch.equal(scaled, (value.float() * gain).bfloat16())
    assert not torch.equal(scaled, value * gain.bfloat16())
