"""The estimator against theory and against the exact gradient of the reference back-end."""

import math

import pytest
import torch

from qzo_diffusion.core.noise import Direction
from qzo_diffusion.core.optimizer import Sgd, Update
from qzo_diffusion.core.parametrize import parametrize
from qzo_diffusion.core.spsa import clip_directional_derivative, mean_loss
from tests.core.seeds import averaged_over
from tests.quantized import BACKENDS, estimated, inputs, scaled_network, squared_output


def exact_gradient(model, scales, x, units):
    """dL/dθ (relative) or dL/ds (absolute) of every scale by autograd, float64."""
    layers = {name: model.get_submodule(name) for name in scales}
    live = {name: layer.absmax for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.absmax = live[name].clone().requires_grad_()
    squared_output(model)(x).mean().backward()
    gradient = {
        name: layer.absmax.grad * (live[name] if units == "relative" else 1)
        for name, layer in layers.items()
    }
    for name, layer in layers.items():
        layer.absmax = live[name]
    return gradient


@pytest.mark.parametrize("units", ["relative", "absolute"])
@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_error_of_the_derivative_is_of_second_order_in_eps(units, distribution):
    model, scales = scaled_network(dtype=torch.float64)
    x = inputs(dtype=torch.float64)
    theta = parametrize(scales, "dense", units)
    direction = Direction(0, 0, 0, distribution)
    gradient = exact_gradient(model, scales, x, units)
    exact = sum(
        (gradient[name] * theta.combined(name, [direction], [1.0])).sum().item() for name in scales
    )
    radii = [0.004, 0.008, 0.016, 0.032] if units == "relative" else [0.0005, 0.001, 0.002, 0.004]
    errors = []
    for eps in radii:
        result = estimated(squared_output(model), [x], theta, [direction], eps=eps)
        errors.append(abs(result.directional_derivative[0] - exact))
    logs = torch.tensor(
        [[math.log(eps), math.log(error)] for eps, error in zip(radii, errors, strict=True)]
    ).double()
    centred = logs - logs.mean(0)
    order = (centred[:, 0] @ centred[:, 1] / (centred[:, 0] @ centred[:, 0])).item()
    assert abs(order - 2) <= 0.1, (order, errors)


@averaged_over(1000, 4000)
@pytest.mark.parametrize("level", ["dense", "layer"])
def test_mean_of_d_z_over_seeds_is_the_gradient(level, seeds):
    model, scales = scaled_network(width=64, out=2, dtype=torch.float64, blocksize=64)
    x = inputs(width=64, dtype=torch.float64)
    theta = parametrize(scales, level)
    dense = exact_gradient(model, scales, x, "relative")
    exact = (
        dense
        if level == "dense"
        else {"layer": torch.stack([dense[name].sum() for name in scales])}
    )
    samples = {name: [] for name in theta.templates()}
    for seed in range(seeds):
        direction = Direction(seed, 0)
        d = estimated(
            squared_output(model), [x], theta, [direction], eps=1e-3
        ).directional_derivative[0]
        for name, drawn in samples.items():
            drawn.append(d * theta.combined(name, [direction], [1.0]))
    for name in samples:
        stacked = torch.stack(samples[name]).double()
        standard_error = stacked.std(0) / seeds**0.5
        deviation = (stacked.mean(0) - exact[name]).abs() / standard_error
        assert deviation.max() < 5, (name, deviation.max())


@pytest.mark.parametrize("units", ["relative", "absolute"])
def test_nothing_asks_for_a_derivative(monkeypatch, units):
    def refuse(*_args, **_options):
        raise AssertionError("autograd was used")

    model, scales = scaled_network("bnb")
    # libraries that are imported on first use look at the functions which are replaced below
    model(inputs())
    monkeypatch.setattr(torch.Tensor, "backward", refuse)
    monkeypatch.setattr(torch.autograd, "backward", refuse)
    monkeypatch.setattr(torch.autograd, "grad", refuse)
    theta = parametrize(scales, "dense", units)

    def objective(x):
        assert not torch.is_grad_enabled()
        return squared_output(model)(x)

    result = estimated(objective, [inputs()], theta, [Direction(0, 0)], eps=1e-2)
    Sgd().step_(theta, Update(result.directions, result.projected_grad, lr=1e-3))
    assert result.finite


@pytest.mark.parametrize(("backend", "quant_type", "blocksize"), BACKENDS)
def test_micro_batches_of_any_size_give_the_same_mean(backend, quant_type, blocksize):
    model, _ = scaled_network(backend, quant_type, blocksize, dtype=torch.float32)
    x = inputs(7)
    whole = mean_loss(squared_output(model), [x])
    parts = mean_loss(squared_output(model), list(x.split(3)))
    # One example's loss may change with the shape of the product: 128 terms, rounded to nearest,
    # twice in a row.
    assert parts == pytest.approx(whole, rel=2 * 128 * 2**-24)


def test_clipping_keeps_the_sign_and_lets_nan_through():
    assert clip_directional_derivative(250.0, 100.0) == 100.0
    assert clip_directional_derivative(-250.0, 100.0) == -100.0
    assert clip_directional_derivative(3.0, 100.0) == 3.0
    assert clip_directional_derivative(250.0, None) == 250.0
    assert math.isnan(clip_directional_derivative(math.nan, 1.0))
    assert clip_directional_derivative(math.inf, 1.0) == 1.0


def test_a_clipped_direction_is_told_and_others_are_not():
    model, scales = scaled_network()
    theta = parametrize(scales, "layer")
    directions = [Direction(0, 0, index) for index in range(4)]
    free = estimated(squared_output(model), [inputs()], theta, directions, eps=1e-2)
    bound = sorted(map(abs, free.directional_derivative))[1]
    result = estimated(
        squared_output(model), [inputs()], theta, directions, eps=1e-2, clip_threshold=bound
    )
    assert sum(result.clipped) == sum(abs(d) > bound for d in free.directional_derivative) > 0
    assert all(abs(g) <= bound for g in result.projected_grad)
    assert result.directional_derivative == free.directional_derivative


def test_an_infinite_probe_is_not_finite_even_when_clipped():
    _, scales = scaled_network()
    losses = iter([torch.tensor([math.inf]), torch.tensor([1.0])])
    result = estimated(
        lambda _: next(losses),
        [None],
        parametrize(scales, "layer"),
        [Direction(0, 0)],
        eps=1e-2,
        clip_threshold=1.0,
    )
    assert not result.finite
