"""The warning of the first steps: a run of noise has it, a healthy one does not, and neither
changes."""

import math
from dataclasses import replace

import pytest
import torch

from qzo_diffusion.core.optimizer import Update, gradient_of, make_optimizer, make_schedule
from qzo_diffusion.core.oracle import exact_gradient
from qzo_diffusion.core.parametrize import parametrize
from qzo_diffusion.core.probing import Probing, StepBatch
from qzo_diffusion.core.spsa import probe
from qzo_diffusion.quant.load import handles_of
from qzo_diffusion.train.early_signal import (
    CHECKED,
    LIMIT,
    EarlySignal,
    can_be_checked,
    slope_along,
    t_statistic,
)
from qzo_diffusion.train.loop import Setup, train
from tests.quantized import inputs, scaled_network, squared_output

PROBING = Probing(0, 1e-3, num_directions=8, per_example=True, estimator="leave_one_out")


def batch_of_step(step, seed=0):
    return StepBatch([inputs(4, width=64, dtype=torch.float64, seed=1000 * seed + step)])


def of_run(seed=0, sign=None, level="separable", probing=PROBING):
    """The setup of a run on a small network.

    With `sign` the loss of each example is multiplied by its sign: then examples have slopes, but
    their mean is zero.
    """
    model, scales = scaled_network("reference", dtype=torch.float64, width=64, blocksize=32)
    plain = squared_output(model)

    def signed(x):
        return plain(x) * torch.where(x[:, 0] > 0, 1.0, -1.0)

    return Setup(
        signed if sign else plain,
        lambda step: batch_of_step(step, seed),
        parametrize(scales, level),
        make_optimizer("sgd"),
        replace(probing, seed=seed),
        make_schedule("constant", 0.01, 100),
    ), model


def warnings_of(setup, steps=CHECKED + 1):
    told = []
    train(replace(setup, take_step=EarlySignal(told.append)), max_steps=steps)
    return told


def test_runs_with_signal_are_not_warned():
    assert [warnings_of(of_run(seed)[0]) for seed in range(5)] == [[]] * 5


def test_runs_of_noise_are_warned_once():
    """One of twenty may pass; three of ten have a chance of 1 %."""
    told = [warnings_of(of_run(seed, sign=True)[0], CHECKED + 4) for seed in range(10)]
    assert sum(map(len, told)) >= 7
    assert max(map(len, told)) == 1
    line = next(one[0] for one in told if one)
    assert line.startswith("warning: ")
    assert "\n" not in line


def test_losses_that_are_noise_alone_are_warned():
    setup, _ = of_run(2)
    generator = torch.Generator().manual_seed(2)
    noise = replace(setup, objective=lambda x: torch.randn(len(x), generator=generator))
    assert len(warnings_of(noise)) == 1


def test_a_run_too_short_to_tell_is_not_warned():
    assert warnings_of(of_run(0, sign=True)[0], CHECKED) == []


def test_the_run_is_the_same_with_and_without():
    found = []
    for watched in (False, True):
        setup, _ = of_run(0, sign=True)
        records = []
        take_step = EarlySignal(lambda text: None) if watched else None
        train(replace(setup, take_step=take_step), max_steps=20, on_step=records.append)
        found.append(([one.estimate for one in records], setup.parametrization.state()))
    (estimates, theta), (others, other) = found
    assert estimates == others
    assert all(torch.equal(theta[name], other[name]) for name in theta)


def test_the_slope_is_that_of_the_next_batch_along_the_estimate():
    setup, model = of_run()
    theta, following = setup.parametrization, batch_of_step(1)
    estimate = probe(setup.objective, batch_of_step(0), theta, setup.probing, 0)
    update = Update(estimate.directions, estimate.projected_grad, lr=1.0)
    exact = exact_gradient(setup.objective, following.micro_batches, theta, handles_of(model))
    along = {name: gradient_of(theta, update, name) for name in exact}
    length = sum(one.square().sum() for one in along.values()).sqrt()
    numbers = sum(one.numel() for one in along.values())
    expected = sum((exact[name] * along[name]).sum() for name in exact) / length * numbers**0.5
    assert slope_along(estimate, setup, following) == pytest.approx(float(expected), rel=1e-3)


def test_the_statistic_is_students_t():
    assert t_statistic([1.0, 2.0, 3.0]) == pytest.approx(2 / (1 / math.sqrt(3)))
    assert math.isnan(t_statistic([1.0, 1.0]))
    assert math.isnan(t_statistic([1.0, math.inf]))
    assert 1.7 < LIMIT < 1.8


@pytest.mark.parametrize(
    ("level", "per_example", "expected"),
    [("separable", True, True), ("row", False, False), ("dense", False, False)],
)
def test_runs_with_few_directions_are_left_alone(level, per_example, expected):
    probing = replace(PROBING, per_example=per_example)
    assert can_be_checked(of_run(level=level, probing=probing)[0]) == expected
