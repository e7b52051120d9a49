"""Losses without a common unit: derivatives within each example, and directions that are left
out.
"""

import math

import pytest
import torch

from qzo_diffusion.core.noise import directions_of_step
from qzo_diffusion.core.optimizer import make_optimizer
from qzo_diffusion.core.parametrize import parametrize
from qzo_diffusion.core.probing import Probing, StepBatch
from qzo_diffusion.core.spsa import estimate
from qzo_diffusion.core.within_example import normalised, without_bad
from qzo_diffusion.train.loop import Setup, train_step_
from tests.quantized import inputs, scaled_network, squared_output

EXAMPLES, DIRECTIONS = 3, 4
EPS = 1e-2


def measured(objective=None, *, leading=None, change=None, **probing):
    """An estimate of three examples; `change` rewrites the losses of each call."""
    model, scales = scaled_network(dtype=torch.float64)
    theta = parametrize(scales, "separable")
    plain = objective or squared_output(model)
    made = {"estimator": "leave_one_out", "within_example": True, **probing}
    count = (DIRECTIONS if made["estimator"] == "leave_one_out" else 1) * EXAMPLES
    batch = StepBatch([inputs(EXAMPLES, dtype=torch.float64)], leading=leading)
    changed = plain if change is None else lambda x: change(plain(x))
    settings = Probing(0, EPS, count // EXAMPLES, per_example=True, **made)
    directions = directions_of_step(0, 0, count, "rademacher")
    return estimate(changed, batch, theta, directions, settings)


def of_example(values, example):
    return torch.tensor(values[example::EXAMPLES], dtype=torch.float64)


def factors(*by_example):
    """Multiply the losses of each example; rows are all examples, again and again."""
    return lambda losses: losses * torch.tensor(by_example).repeat(len(losses) // EXAMPLES)


@pytest.mark.parametrize("estimator", ["leave_one_out", "antithetic"])
def test_every_example_has_derivatives_of_rms_one(estimator):
    found = measured(estimator=estimator)
    for example in range(EXAMPLES):
        assert of_example(found.projected_grad, example).square().mean() == pytest.approx(1)
        one = of_example(found.directional_derivative, example)
        expected = one / one.square().mean().sqrt()
        assert of_example(found.projected_grad, example).tolist() == pytest.approx(
            expected.tolist()
        )


def test_derivatives_are_clipped_before_they_are_normalised():
    plain = measured()
    threshold = 0.5 * max(map(abs, plain.directional_derivative))
    found = measured(clip_threshold=threshold)
    assert any(found.clipped)
    for example in range(EXAMPLES):
        kept = of_example(plain.directional_derivative, example).clamp(-threshold, threshold)
        expected = kept / kept.square().mean().sqrt()
        own = of_example(found.projected_grad, example)
        assert own.tolist() == pytest.approx(expected.tolist())


def test_the_unit_of_an_example_does_not_count():
    plain, scaled = measured(), measured(change=factors(1.0, 1e4, 1e-3))
    assert scaled.projected_grad == pytest.approx(plain.projected_grad, rel=1e-6)
    assert scaled.directional_derivative != pytest.approx(plain.directional_derivative, rel=1e-2)


def test_examples_behind_the_leading_ones_keep_their_relation_to_them():
    """Those of the prior: they are divided by what the others are divided by on average."""
    found = measured(leading=2)
    spreads = [
        of_example(found.directional_derivative, example).square().mean().sqrt()
        for example in range(2)
    ]
    expected = of_example(found.directional_derivative, 2) / (sum(spreads) / 2)
    assert of_example(found.projected_grad, 2).tolist() == pytest.approx(expected.tolist())
    assert of_example(found.projected_grad, 0).square().mean() == pytest.approx(1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_direction_without_a_loss_is_left_out_and_the_step_goes_on(bad):
    """Picture 1 of direction 2 has no score."""
    place = 2 * EXAMPLES + 1

    def change(losses):
        return losses.index_fill(0, torch.tensor([place]), bad)

    found, whole = measured(change=change), measured()
    assert found.finite
    assert found.left_out == 1
    assert whole.left_out == 0
    assert found.projected_grad[place] == found.directional_derivative[place] == 0
    for example in (0, 2):
        assert of_example(found.projected_grad, example).tolist() == pytest.approx(
            of_example(whole.projected_grad, example).tolist()
        )
    kept = [at for at in range(1, DIRECTIONS * EXAMPLES, EXAMPLES) if at != place]
    losses = torch.tensor([whole.loss_plus[at] for at in kept], dtype=torch.float64)
    signal = torch.tensor([found.projected_grad[at] for at in kept], dtype=torch.float64)
    centred = losses - losses.mean()
    assert torch.corrcoef(torch.stack([centred, signal]))[0, 1] == pytest.approx(1)


def test_both_sides_are_left_out_where_one_has_no_loss():
    def change(losses):  # all examples at +ε, then all at -ε
        return losses.index_fill(0, torch.tensor([EXAMPLES]), math.nan)

    found = measured(change=change, estimator="antithetic")
    assert found.finite
    assert found.left_out == 1
    assert found.projected_grad[0] == 0
    assert all(found.projected_grad[1:])


def test_an_example_without_any_loss_and_one_whose_losses_are_equal_do_nothing():
    def change(losses):
        rows = losses.view(DIRECTIONS, EXAMPLES).clone()
        rows[:, 0], rows[:, 1] = math.nan, 7.3
        return rows.view(-1)

    found = measured(change=change)
    assert found.finite
    assert found.left_out == DIRECTIONS
    assert not of_example(found.projected_grad, 0).any()
    assert not of_example(found.projected_grad, 1).any()
    assert of_example(found.projected_grad, 2).square().mean() == pytest.approx(1)


def test_a_step_without_any_loss_is_skipped():
    _model, scales = scaled_network(dtype=torch.float64)
    theta = parametrize(scales, "separable")
    setup = Setup(
        lambda x: torch.full((len(x),), math.nan),
        lambda step: StepBatch([inputs(2, dtype=torch.float64)]),
        theta,
        make_optimizer("sgd"),
        Probing(0, EPS, 2, per_example=True, estimator="leave_one_out", within_example=True),
        lambda step: 0.1,
    )
    record = train_step_(setup, setup.batch_of_step(0), 0)
    assert record.skipped
    assert not any(one.any() for one in theta.state().values())


def test_the_count_of_left_out_directions_is_in_the_metrics():
    model, scales = scaled_network(dtype=torch.float64)
    plain = squared_output(model)

    def setup(objective):
        return Setup(
            objective,
            lambda step: StepBatch([inputs(2, dtype=torch.float64)]),
            parametrize(scales, "separable"),
            make_optimizer("sgd"),
            Probing(0, EPS, 3, per_example=True, estimator="leave_one_out", within_example=True),
            lambda step: 0.1,
        )

    def first_is_bad(x):
        return plain(x).index_fill(0, torch.tensor([0]), math.nan)

    one, other = setup(first_is_bad), setup(plain)
    assert train_step_(one, one.batch_of_step(0), 0).as_dict()["left_out"] == 1
    assert "left_out" not in train_step_(other, other.batch_of_step(0), 0).as_dict()


def test_shared_directions_are_refused():
    model, scales = scaled_network()
    theta, batch = parametrize(scales, "separable"), StepBatch([inputs(2)])
    settings = Probing(0, EPS, 2, estimator="leave_one_out", within_example=True)
    directions = directions_of_step(0, 0, 2, "rademacher")
    with pytest.raises(ValueError, match="within_example"):
        estimate(squared_output(model), batch, theta, directions, settings)


def test_ranks_agree_although_only_one_has_the_bad_loss():
    """Sums over ranks come first: a rank whose example is bad has zeros in the others' places."""
    losses = [[1.0, math.nan, 3.0, 4.0, 5.0, 6.0]]
    filled, bad = without_bad(losses, 2)
    assert bad == [False, True, False, False, False, False]
    assert filled == [[1.0, 5.0, 3.0, 4.0, 5.0, 6.0]]
    assert without_bad([[math.nan, math.nan]], 1)[1] == [False, False]


def test_rounding_is_no_difference():
    assert normalised([1e-15, -1e-15, 2.0, -2.0], 1e-12, 2, 2)[::2] != [0.0, 0.0]
    assert normalised([1e-15, 2.0, -1e-15, -2.0], 1e-12, 2, 2) == [0.0, 1.0, 0.0, -1.0]
