"""Updates against their formulas, and a descent on a real quantized network."""

import math
from dataclasses import replace

import pytest
import torch

from qzo_diffusion.core.noise import Direction, directions_of_step
from qzo_diffusion.core.optimizer import (
    Adam,
    InRunningRms,
    Momentum,
    Sgd,
    Update,
    gradient_of,
    make_optimizer,
    make_schedule,
)
from qzo_diffusion.core.parametrize import parametrize
from qzo_diffusion.core.spsa import mean_loss
from tests.quantized import estimated, inputs, scaled_network, squared_output


def known_update(
    count: int = 1, distribution: str = "rademacher", step: int = 0, grad: float = 0.5
) -> Update:
    grads = tuple(grad * (index + 1) for index in range(count))
    return Update(directions_of_step(7, step, count, distribution), grads, lr=0.01)


def numbers_after(optimizer, updates):
    """θ of every layer after the steps, at layer level."""
    _, scales = scaled_network()
    theta = parametrize(scales, "layer")
    for one in updates:
        optimizer.step_(theta, one)
    return {name: theta.of_layer("layer", name).item() for name in scales}


@pytest.mark.parametrize("count", [1, 3])
def test_sgd_moves_against_the_mean_of_g_z(count):
    one = known_update(count)
    after = numbers_after(Sgd(), [one])
    for index, theta in enumerate(after.values()):
        pairs = zip(one.projected_grad, one.directions, strict=True)
        mean = sum(g * d.z("layer", torch.empty(2))[index].item() for g, d in pairs) / count
        assert theta == pytest.approx(-0.01 * mean, rel=1e-6)


def test_momentum_is_an_average_of_past_estimates():
    updates = [known_update(step=step) for step in range(3)]
    after = numbers_after(Momentum(beta=0.5), updates)
    for index, theta in enumerate(after.values()):
        velocity = expected = 0.0
        for one in updates:
            velocity = (
                0.5 * velocity
                + one.projected_grad[0] * one.directions[0].z("layer", torch.empty(2))[index].item()
            )
            expected -= 0.01 * 0.5 * velocity
        assert theta == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("count", "distribution"), [(1, "rademacher"), (1, "gaussian"), (4, "rademacher")]
)
def test_adam_agrees_with_torchs_adam_on_the_same_gradients(count, distribution):
    updates = [known_update(count, distribution, step, grad=0.3 + step) for step in range(5)]
    _, scales = scaled_network()
    theta = parametrize(scales, "dense")
    name = next(iter(scales))
    initial = scales[name].clone()
    parameter = torch.zeros_like(scales[name], requires_grad=True)
    theirs = torch.optim.Adam([parameter], lr=0.01, betas=(0.9, 0.99), eps=1e-8)
    ours = Adam()
    for one in updates:
        parameter.grad = gradient_of(theta, one, name)
        theirs.step()
        ours.step_(theta, one)
    # fp32 scales carry θ with an error of one rounding a step.
    torch.testing.assert_close(
        torch.log(scales[name] / initial), parameter.detach(), rtol=0, atol=5 * 5 * 2**-24
    )


def test_adam_stores_one_scalar_for_a_single_rademacher_direction():
    _, scales = scaled_network()
    adam = Adam()
    adam.step_(parametrize(scales, "dense"), known_update())
    seconds = [tensor for name, tensor in adam.state().items() if name.startswith("second.")]
    assert seconds
    assert all(tensor.numel() == 1 for tensor in seconds)


def test_adam_goes_on_with_more_directions_or_fewer():
    """Its scalar of one direction becomes a number for each scale, and stays so."""
    _, scales = scaled_network()
    adam, theta = Adam(), parametrize(scales, "dense")
    for step, count in enumerate((1, 2, 1)):
        directions = directions_of_step(0, step, count, "rademacher")
        adam.step_(theta, Update(directions, (1.0, -0.5)[:count], 1e-3))
        again = Adam()
        again.load_state_(adam.state())
        adam = again
    assert adam.state()["second.0"].shape == scales["0"].shape


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
def test_a_loaded_state_continues_as_if_never_stopped(name):
    updates = [known_update(step=step, grad=0.3 + step) for step in range(4)]
    whole = numbers_after(make_optimizer(name), updates)
    _, scales = scaled_network()
    theta, first = parametrize(scales, "layer"), make_optimizer(name)
    for one in updates[:2]:
        first.step_(theta, one)
    second = make_optimizer(name)
    second.load_state_(first.state())
    for one in updates[2:]:
        second.step_(theta, one)
    assert whole == {name: theta.of_layer("layer", name).item() for name in scales}


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("level", ["dense", "layer"])
def test_the_loss_falls(name, level):
    model, scales = scaled_network()
    theta, optimizer = parametrize(scales, level), make_optimizer(name)
    objective, x = squared_output(model), inputs(16)
    start = mean_loss(objective, [x])
    for step in range(60):
        result = estimated(objective, [x], theta, [Direction(0, step)], eps=1e-2)
        optimizer.step_(
            theta,
            Update(result.directions, result.projected_grad, lr=0.02 if name == "adam" else 0.1),
        )
    with scales.override(theta.perturbed()):
        end = mean_loss(objective, [x])
    assert end < 0.9 * start


def test_running_spreads_are_the_root_of_the_running_mean_of_squares():
    """Of two steps with decay 0.5: 0.5 a² / 0.5, then (0.25 a² + 0.5 b²) / 0.75."""
    one, other = known_update(grad=3.0), known_update(step=1, grad=4.0)
    after = numbers_after(InRunningRms(Sgd(), decay=0.5), [one, other])
    units = 3.0, math.sqrt((0.25 * 9 + 0.5 * 16) / 0.75)
    expected = numbers_after(
        Sgd(),
        [
            replace(u, projected_grad=(u.projected_grad[0] / unit,))
            for u, unit in zip((one, other), units, strict=True)
        ],
    )
    assert after == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
def test_in_running_rms_the_scale_of_a_loss_says_nothing_and_a_resumed_run_goes_on(name):
    def updates(scale):
        return [known_update(3, step=step, grad=scale * (step + 1)) for step in range(4)]

    after = numbers_after(InRunningRms(make_optimizer(name)), updates(1.0))
    assert numbers_after(InRunningRms(make_optimizer(name)), updates(1000.0)) == pytest.approx(
        after, rel=1e-6
    )
    _, scales = scaled_network()
    theta, optimizer = parametrize(scales, "layer"), InRunningRms(make_optimizer(name))
    for index, one in enumerate(updates(1.0)):
        if index == 2:
            state = {key: tensor.clone() for key, tensor in optimizer.state().items()}
            optimizer = InRunningRms(make_optimizer(name))
            optimizer.load_state_(state)
        optimizer.step_(theta, one)
    assert {layer: theta.of_layer("layer", layer).item() for layer in scales} == after


def test_a_past_without_any_loss_difference_does_not_divide_by_zero():
    still = known_update(grad=0.0)
    assert set(numbers_after(InRunningRms(Sgd()), [still]).values()) == {0.0}


def test_constant_schedule():
    at = make_schedule("constant", 0.1, 10)
    assert {at(step) for step in range(10)} == {0.1}


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_falling_schedules_warm_up_to_the_peak_and_end_near_zero(name):
    at = make_schedule(name, 0.1, 100, warmup_steps=10)
    values = [at(step) for step in range(100)]
    assert values[0] == pytest.approx(0.01)
    assert max(values) == pytest.approx(0.1)
    assert values[9] == pytest.approx(0.1)
    assert values[10:] == sorted(values[10:], reverse=True)
    assert 0 < values[-1] < 0.1 * 0.02


def test_hold_starts_high_stays_even_and_ends_at_zero():
    at = make_schedule("hold", 0.8, 1000)
    assert [at(step) for step in (0, 62, 125, 400, 700)] == pytest.approx(
        [0.8, 0.6512, 0.5, 0.5, 0.5]
    )
    assert [at(850), at(1000)] == pytest.approx([0.25, 0.0])


def test_inverse_sqrt_is_the_same_for_any_number_of_steps_until_it_cools_down():
    short, long = (make_schedule("inverse_sqrt", 0.1, steps) for steps in (1000, 4000))
    assert [short(step) for step in (0, 32, 96, 480)] == pytest.approx(
        [0.1, 0.1 / 2**0.5, 0.05, 0.025]
    )
    assert [short(step) for step in range(701)] == [long(step) for step in range(701)]
    assert short(850) == pytest.approx(long(850) / 2)
    assert short(1000) == 0


@pytest.mark.parametrize("name", ["hold", "inverse_sqrt"])
def test_a_warm_up_goes_before_the_schedule(name):
    at, late = make_schedule(name, 0.1, 100), make_schedule(name, 0.1, 110, warmup_steps=10)
    assert [late(step) for step in (0, 4, 9)] == pytest.approx([0.01, 0.05, 0.1])
    assert [late(step + 10) for step in range(101)] == [at(step) for step in range(101)]


def test_cosine_is_half_way_in_the_middle():
    assert make_schedule("cosine", 1.0, 100)(50) == pytest.approx(0.5)
