"""The loop on a network of two layers: what is recorded, skipped, stopped and repeated."""

import math
from dataclasses import replace

import pytest
import torch

from qzo_diffusion.core.errors import TrainingDiverged
from qzo_diffusion.core.optimizer import make_optimizer, make_schedule
from qzo_diffusion.core.parametrize import parametrize
from qzo_diffusion.core.probing import Probing, StepBatch
from qzo_diffusion.train.loop import MAX_BAD_STEPS, Setup, train
from tests.quantized import inputs, scaled_network, squared_output


class Run:
    """One training run and everything it told."""

    def __init__(
        self, *, steps=5, level="dense", spoil=lambda step: False, optimizer="sgd", **probing
    ):
        self.model, self.scales = scaled_network()
        self.theta = parametrize(self.scales, level)
        self.records, self.done = [], []
        self.step = -1
        self.spoil = spoil
        self.arguments = {
            "setup": Setup(
                self.objective,
                self.batch,
                self.theta,
                make_optimizer(optimizer),
                Probing(**{"seed": 0, "eps": 1e-2, **probing}),
                make_schedule("linear", 0.1, steps),
            ),
            "max_steps": steps,
            "on_step": self.records.append,
            "after_step": self.done.append,
        }

    def batch(self, step):
        self.step = step
        return StepBatch(list(inputs(6, seed=step).split(4)), sigma_mean=0.5)

    def objective(self, x):
        losses = squared_output(self.model)(x)
        return losses * math.nan if self.spoil(self.step) else losses

    def go(self, **changes):
        return train(**{**self.arguments, **changes})

    def copies(self):
        return {name: self.scales[name].clone() for name in self.scales}


def without_seconds(records):
    return [
        {key: value for key, value in record.as_dict().items() if key != "seconds"}
        for record in records
    ]


def test_every_step_is_recorded_with_what_the_contract_names():
    run = Run()
    outcome = run.go()
    assert outcome == type(outcome)(5, 0, False)
    assert [record.step for record in run.records] == [0, 1, 2, 3, 4]
    assert run.done == [1, 2, 3, 4, 5]
    record = run.records[1]
    line = record.as_dict()
    assert record.directional_derivative == pytest.approx(
        (line["loss_plus"] - line["loss_minus"]) / 0.02
    )
    assert record.loss == pytest.approx((line["loss_plus"] + line["loss_minus"]) / 2)
    assert (record.lr, record.eps, record.sigma_mean, record.clipped) == (
        pytest.approx(0.08),
        1e-2,
        0.5,
        False,
    )
    assert record.seconds > 0


def test_a_line_has_one_number_for_each_key():
    """Means of the losses, the rms of the derivatives, the fraction clipped."""
    run = Run(num_directions=4)
    run.go()
    found, line = run.records[0].estimate, run.records[0].as_dict()
    assert len(found.projected_grad) == 4
    assert not any(isinstance(value, list | tuple) for value in line.values())
    assert line["loss_plus"] == pytest.approx(sum(found.loss_plus) / 4)
    assert line["loss_minus"] == pytest.approx(sum(found.loss_minus) / 4)
    squares = [d * d for d in found.directional_derivative]
    assert line["directional_derivative"] == pytest.approx(math.sqrt(sum(squares) / 4))
    assert line["clipped"] == 0.0
    clipped = Run(num_directions=4, clip_threshold=1e-9)
    clipped.go()
    assert clipped.records[0].clipped == 1.0
    assert clipped.records[0].projected_grad == pytest.approx(1e-9)


def test_losses_of_both_infinities_are_a_skipped_step():
    """Their sum has no value, and their line none either."""
    run = Run(num_directions=2, estimator="leave_one_out", steps=1)
    signs = iter([math.inf, -math.inf])

    def objective(x):
        losses = run.objective(x)
        return losses * (next(signs) if len(x) == 4 else 1.0)

    run.go(setup=replace(run.arguments["setup"], objective=objective))
    assert run.records[0].skipped
    assert math.isnan(run.records[0].as_dict()["loss_plus"])


@pytest.mark.parametrize("level", ["dense", "layer"])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_the_same_run_twice_is_bit_identical(level, optimizer):
    runs = [Run(level=level, optimizer=optimizer) for _ in range(2)]
    for run in runs:
        run.go()
        run.theta.merge_()
    assert without_seconds(runs[0].records) == without_seconds(runs[1].records)
    assert all(torch.equal(runs[0].scales[name], runs[1].scales[name]) for name in runs[0].scales)


def test_another_seed_is_another_run():
    first, second = Run(), Run(seed=1)
    first.go()
    second.go()
    assert without_seconds(first.records) != without_seconds(second.records)


def test_a_run_in_two_parts_is_the_whole_run():
    whole, parts = Run(steps=6), Run(steps=6)
    whole.go()
    parts.go(max_steps=3)
    parts.go(first_step=3)
    assert without_seconds(whole.records) == without_seconds(parts.records)
    assert all(torch.equal(whole.scales[name], parts.scales[name]) for name in whole.scales)


def test_a_step_with_a_nan_loss_changes_nothing_and_is_counted():
    run = Run(steps=3, spoil=lambda step: step == 1)
    states = [run.copies()]
    outcome = run.go(after_step=lambda _: states.append(run.copies()))
    assert outcome.skipped == 1
    assert [record.skipped for record in run.records] == [False, True, False]
    assert all(torch.equal(states[1][name], states[2][name]) for name in run.scales)
    assert not any(torch.equal(states[2][name], states[3][name]) for name in run.scales)


def test_ten_bad_steps_in_a_row_stop_the_run_with_the_last_good_scales():
    run = Run(steps=50, spoil=lambda step: step >= 2)
    good = []
    with pytest.raises(TrainingDiverged, match="10 steps in a row"):
        run.go(after_step=lambda done: good.append(run.copies()) if done == 2 else None)
    assert len(run.records) == 2 + MAX_BAD_STEPS
    assert all(torch.equal(good[0][name], run.scales[name]) for name in run.scales)


def test_nine_bad_steps_in_a_row_do_not():
    run = Run(steps=30, spoil=lambda step: step % MAX_BAD_STEPS != 0)
    assert run.go().skipped == 27


def test_a_stop_is_answered_between_steps():
    run = Run(steps=50)
    outcome = run.go(stop_requested=lambda: len(run.records) == 3)
    assert (outcome.steps_done, outcome.stopped) == (3, True)


def test_no_steps_is_a_run_too():
    run = Run(steps=0)
    assert run.go().steps_done == 0
    assert run.records == []
