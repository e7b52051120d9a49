"""θ stays near the base: decay before a step, a bound after it."""

import pytest
import torch

from qzo_diffusion.core.near_base import NearBase
from qzo_diffusion.core.noise import directions_of_step
from qzo_diffusion.core.optimizer import Adam, Momentum, Sgd, Update
from qzo_diffusion.core.parametrize import parametrize
from tests.quantized import scaled_network


def parametrization():
    _, scales = scaled_network()
    return parametrize(scales, "separable")


def step_of(optimizer, theta, lr, amount):
    directions = directions_of_step(7, 0, 2, "rademacher")
    optimizer.step_(theta, Update(directions, (amount, -amount), lr))


@pytest.fixture
def theta():
    return parametrization()


def test_decay_shrinks_before_the_step_by_its_rate(theta):
    plain = parametrization()
    for one in (theta, plain):
        for tensor in one.state().values():
            tensor.fill_(0.5)
    step_of(NearBase(Sgd(), decay=0.3), theta, 0.1, 1.0)
    for tensor in plain.state().values():
        tensor.mul_(1 - 0.3 * 0.1)
    step_of(Sgd(), plain, 0.1, 1.0)
    for name, tensor in theta.state().items():
        assert torch.equal(tensor, plain.state()[name])


def test_no_number_goes_beyond_the_bound(theta):
    step_of(NearBase(Sgd(), bound=0.02), theta, 1.0, 3.0)
    moved = torch.cat([tensor.flatten() for tensor in theta.state().values()])
    assert moved.abs().max() == pytest.approx(0.02)
    assert (moved.abs() > 0).any()


@pytest.mark.parametrize("optimizer", [Momentum, Adam])
def test_its_state_is_the_inner_one(theta, optimizer):
    kept, again = NearBase(optimizer(), 0.1, 0.05), NearBase(optimizer(), 0.1, 0.05)
    step_of(kept, theta, 0.1, 1.0)
    again.load_state_(kept.state())
    other = parametrization()
    other.load_state_({name: tensor.clone() for name, tensor in theta.state().items()})
    step_of(kept, theta, 0.1, 2.0)
    step_of(again, other, 0.1, 2.0)
    for name, tensor in theta.state().items():
        assert torch.equal(tensor, other.state()[name])


def test_room_widens_the_bound_alone(theta):
    step_of(NearBase(Sgd(), bound=0.02).with_room(2.0), theta, 1.0, 3.0)
    moved = torch.cat([tensor.flatten() for tensor in theta.state().values()])
    assert moved.abs().max() == pytest.approx(0.04)


def test_a_decay_that_would_turn_numbers_around_is_refused(theta):
    with pytest.raises(ValueError, match="at most 1"):
        step_of(NearBase(Sgd(), decay=20.0), theta, 0.1, 1.0)
