"""Slope and curvature where a run begins, against those that a model of one exponential an output
has by its formula.
"""

import math

import pytest
import torch

from qzo_diffusion.core.noise import directions_of_step
from qzo_diffusion.core.parametrize import parametrize
from qzo_diffusion.core.probing import Probing, StepBatch
from qzo_diffusion.train.calibrate import (
    FULL_RATE,
    MOST_ROOM,
    WIDER,
    LrCalibration,
    calibrate,
    calibration_batches,
)
from tests.quantized import assert_same, inputs, scaled_network, snapshot

EXAMPLES, EPS, SEED = 6, 1e-2, 5
BATCHES = 3  # of six examples, for sixteen


class Exponentials:
    """L(θ) = Σ_j c_j (exp(θ_j) (W h)_j + b_j): its second derivatives are its first, g_j = c_j (W
    h)_j.
    """

    def __init__(self):
        self.model, self.scales = scaled_network(dtype=torch.float64)
        self.theta = parametrize(self.scales, "row", trained=["2"])
        self.weights = torch.linspace(-1.0, 2.0, self.scales.rows("2"), dtype=torch.float64)

    def batch(self, step):
        return StepBatch(list(inputs(EXAMPLES, seed=step, dtype=torch.float64).split(4)))

    def objective(self, x):
        return self.model(x) @ self.weights

    def gradients(self, step):
        """[examples, numbers]"""
        whole = torch.cat(list(self.batch(step).micro_batches))
        with torch.no_grad():
            return (self.model(whole) - self.model.get_submodule("2").bias) * self.weights

    def calibrate(self, **changes):
        given = {"seed": SEED, "eps": EPS, "per_example": True, "normalize": True} | changes
        return calibrate(self.objective, self.batch, self.theta, Probing(**given))


@pytest.mark.parametrize("probes_per_forward", [None, 1])
def test_slope_and_curvature_are_those_of_the_formula(probes_per_forward):
    task = Exponentials()
    before = snapshot(task.model, task.scales)
    found = task.calibrate(probes_per_forward=probes_per_forward)
    assert_same(snapshot(task.model, task.scales), before)
    radius, squares, traces = WIDER * EPS, [], []
    for step in range(BATCHES):
        gradients = task.gradients(step)
        directions = directions_of_step(SEED, step, EXAMPLES, "rademacher")
        z = torch.stack([direction.z("row", task.theta.by_axis["row"]) for direction in directions])
        squares.append(
            (gradients * z).sum(1).square().mean().item() * (math.sinh(radius) / radius) ** 2
        )
        traces += (gradients.sum(1) * 2 * (math.cosh(radius) - 1) / radius**2).tolist()
    assert found.slope == pytest.approx(math.sqrt(sum(squares) / BATCHES), rel=1e-9)
    assert found.curvature == pytest.approx(sum(traces) / len(traces), rel=1e-6)
    assert found.error == pytest.approx(
        torch.tensor(traces).std().item() / math.sqrt(BATCHES * EXAMPLES), rel=1e-4
    )
    assert [calibration_batches(examples) for examples in (1, 6, 16, 64)] == [16, BATCHES, 1, 1]


def test_a_larger_loss_asks_for_nothing_else():
    """Slope and curvature grow alike, so the rate of a normalised step stays."""
    task = Exponentials()
    one = task.calibrate()
    task.weights = task.weights * 50
    assert task.calibrate().rate_factor == pytest.approx(one.rate_factor, rel=1e-6)


def test_only_a_loss_that_curves_much_for_its_slope_lowers_the_rate():
    assert LrCalibration(1.0, 1.0, 0.1).rate_factor == 1
    assert LrCalibration(0.4, 8.0, 0.3).rate_factor == pytest.approx(0.05 / FULL_RATE)
    assert LrCalibration(0.4, 8.0, 0.3).room == pytest.approx(0.05 / FULL_RATE)
    assert 1 < LrCalibration(0.8, 8.0, 0.3).room == pytest.approx(0.1 / FULL_RATE)
    assert LrCalibration(9.0, 8.0, 0.3).room == 4  # at most
    assert LrCalibration(0.1, 8.0, 4.1).room == 1  # as far as can be told it may be flat
    assert LrCalibration(0.1, 8.0, 4.1).rate_factor == 1  # as far as can be told it may be flat
    assert LrCalibration(0.1, -8.0, 0.1).rate_factor == 1
    assert LrCalibration(0.0, 8.0, 0.1).rate_factor == 1  # nothing moves at any rate
    assert LrCalibration(math.nan, 8.0, 0.1).rate_factor == 1  # the step itself is skipped
    assert LrCalibration(0.1, math.nan, 0.1).rate_factor == 1


def test_a_bound_is_widened_and_narrowed_by_the_same_measure_within_limits():
    assert LrCalibration(3 * FULL_RATE, 1.0, 0.1).room == pytest.approx(3)
    assert LrCalibration(9.0, 1.0, 0.1).room == MOST_ROOM
    assert LrCalibration(1e-3, 1.0, 0.1).room == 1 / MOST_ROOM
    assert LrCalibration(0.1, 8.0, 4.1).room == 1  # as far as can be told it may be flat
    assert LrCalibration(math.nan, math.nan, math.nan).room == 1


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_leaves_the_rate_to_the_loop(broken):
    task = Exponentials()
    sound = task.objective
    task.objective = lambda x: (
        sound(x) + torch.tensor([broken] + [0.0] * (len(x) - 1), dtype=torch.float64)
    )
    assert task.calibrate().rate_factor == 1


def test_parts_of_a_batch_on_several_processes_find_what_one_does():
    whole = Exponentials().calibrate()
    asked: list[list[float]] = []

    def part(start, stop, sums):
        task = Exponentials()

        def batch(step):
            mine = torch.cat(list(task.batch(step).micro_batches))[start:stop]
            return StepBatch([mine], first_example=start, examples=EXAMPLES)

        probing = Probing(seed=SEED, eps=EPS, per_example=True, normalize=True)
        return calibrate(task.objective, batch, task.theta, probing, sums)

    part(0, 2, lambda values: asked.append(list(values)) or list(values))
    heard = iter(asked)
    found = part(
        2, EXAMPLES, lambda values: [a + b for a, b in zip(values, next(heard), strict=True)]
    )
    assert found.slope == pytest.approx(whole.slope, rel=1e-9)
    assert found.curvature == pytest.approx(whole.curvature, rel=1e-6)
