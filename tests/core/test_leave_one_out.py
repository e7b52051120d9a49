"""Directions that are each set against the others of the same example: the gradient on average, for
half the forwards.
"""

import math

import pytest
import torch

from qzo_diffusion.core import oracle
from qzo_diffusion.core.noise import Direction, directions_of_step
from qzo_diffusion.core.optimizer import Update, gradient_of
from qzo_diffusion.core.parametrize import parametrize
from qzo_diffusion.core.probes import sample_losses
from qzo_diffusion.core.spsa import rms
from qzo_diffusion.quant.load import handles_of
from tests.core.seeds import averaged_over
from tests.core.test_patch_groups import EXAMPLES, REGIONS, network_of_tokens, of_regions, tokens
from tests.core.test_per_example import exact_gradient
from tests.quantized import assert_same, estimated, inputs, scaled_network, snapshot, squared_output

MADE = {"eps": 1e-2, "estimator": "leave_one_out"}


@pytest.mark.parametrize("probes_per_forward", [None, 1, 2, 3])
@pytest.mark.parametrize("level", ["row", "separable"])
def test_derivatives_are_those_of_the_formula(level, probes_per_forward):
    """Also in regions, and where this process has examples 1 and 2 of a batch of 4."""
    model, scales, theta = network_of_tokens(level)
    x = tokens(4)
    directions = directions_of_step(0, 0, 5 * 4, "rademacher", REGIONS)
    made = MADE | {
        "per_example": True,
        "first_example": 1,
        "examples": 4,
        "probes_per_forward": probes_per_forward,
    }
    found = estimated(of_regions(model), list(x[1:3].split(1)), theta, directions, **made)
    for example in (1, 2):
        own = directions[example::4]
        losses = []
        for direction in own:
            with scales.override(*theta.probes([direction], [1e-2])):
                losses.append(
                    torch.tensor(sample_losses(of_regions(model), x[example : example + 1]))
                )
        for place, loss in enumerate(losses):
            others = torch.stack(
                [other for index, other in enumerate(losses) if index != place]
            ).mean(0)
            at = (place * 4 + example) * REGIONS
            assert found.loss_plus[at : at + REGIONS] == pytest.approx(loss.tolist(), rel=1e-6)
            assert found.directional_derivative[at : at + REGIONS] == pytest.approx(
                ((loss - others) / 1e-2).tolist(), rel=1e-3, abs=1e-4
            )
    assert not any(
        found.directional_derivative[index]
        for start in (0, 3)
        for index in range(start * REGIONS, (start + 1) * REGIONS)
    )


@averaged_over(250, 1000)
@pytest.mark.parametrize(
    ("level", "per_example"),
    [("separable", True), ("layer", True), ("dense", False), ("row", False)],
)
def test_the_mean_over_seeds_is_the_gradient(level, per_example, seeds):
    """Of a loss with curvature, at a radius where one side alone is far off."""
    model, scales = scaled_network(width=64, out=2, dtype=torch.float64, blocksize=32)
    theta = parametrize(scales, level)
    x = inputs(2, width=64, dtype=torch.float64)
    exact = exact_gradient(model, scales, theta, x) if level != "dense" else None
    samples = {name: [] for name in theta.templates()}
    for seed in range(seeds):
        directions = directions_of_step(seed, 0, 8 if per_example else 4, "rademacher")
        made = {"per_example": True, "examples": 2} if per_example else {}
        found = estimated(
            squared_output(model), [x], theta, directions, **MADE | {"eps": 3e-3}, **made
        )
        for name in samples:
            samples[name].append(
                gradient_of(theta, Update(directions, found.directional_derivative, lr=1.0), name)
            )
    if exact is None:
        exact = {name: scales_gradient(model, scales, name, x) for name in samples}
    for name, values in samples.items():
        stacked = torch.stack(values).double()
        deviation = (stacked.mean(0) - exact[name]).abs() / (stacked.std(0) / seeds**0.5)
        assert deviation.max() < 5, name


def scales_gradient(model, scales, name, x):
    layer = model.get_submodule(name)
    live = layer.absmax
    layer.absmax = live.clone().requires_grad_()
    squared_output(model)(x).mean().backward()
    gradient = (layer.absmax.grad * live).reshape(scales[name].shape)
    layer.absmax = live
    return gradient


@pytest.mark.parametrize("count", [4, 8])
def test_of_as_many_forwards_it_makes_more_directions(count):
    """K forwards: K - 1 of them count, where probes of both sides make K / 2."""
    model, scales = scaled_network(dtype=torch.float64)
    theta = parametrize(scales, "row")
    x = inputs(1, dtype=torch.float64)
    variances = []
    for estimator, directions_each in (("antithetic", count // 2), ("leave_one_out", count)):
        found = []
        for seed in range(600):
            directions = directions_of_step(seed, 0, directions_each, "rademacher")
            one = estimated(
                squared_output(model),
                [x],
                theta,
                directions,
                eps=1e-4,
                estimator=estimator,
                per_example=True,
                examples=1,
            )
            found.append(
                gradient_of(theta, Update(directions, one.directional_derivative, lr=1.0), "row")
            )
        variances.append(torch.stack(found).var(0).sum())
    assert variances[0] / variances[1] == pytest.approx((count - 1) / (count / 2), rel=0.12)


def test_neither_the_loss_itself_nor_the_same_curvature_everywhere_is_seen():
    """c + k · Σθ² rises by the same in every direction of ±1."""
    model, scales = scaled_network(dtype=torch.float64)
    theta = parametrize(scales, "dense")
    before = {name: live.clone() for name, live in scales.tensors().items()}

    def bowl(_):
        shown = {name: model.get_submodule(name).absmax for name in scales}
        return torch.stack(
            [
                3.0
                + sum(
                    (shown[name].view_as(live) / live).log().square().sum()
                    for name, live in before.items()
                )
            ]
        )

    found = estimated(bowl, [None], theta, directions_of_step(0, 0, 4, "rademacher"), **MADE)
    assert found.directional_derivative == pytest.approx([0.0] * 4, abs=1e-9)
    assert found.loss > 3.0


@pytest.mark.parametrize("level", ["dense", "separable"])
def test_shared_directions_are_set_against_each_other_over_the_whole_batch(level):
    model, scales = scaled_network(dtype=torch.float64)
    theta = parametrize(scales, level)
    x, directions = inputs(5, dtype=torch.float64), directions_of_step(0, 0, 3, "rademacher")
    found = estimated(squared_output(model), list(x.split(2)), theta, directions, **MADE)
    losses = []
    for direction in directions:
        with scales.override(theta.perturbed(direction, 1e-2)):
            losses.append(squared_output(model)(x).mean().item())
    expected = [(loss - (sum(losses) - loss) / 2) / 1e-2 for loss in losses]
    assert found.directional_derivative == pytest.approx(expected, rel=1e-6)
    assert found.loss == pytest.approx(sum(losses) / 3)


def test_ranks_that_share_a_batch_find_what_one_does():
    _, _, theta = found = network_of_tokens("separable")
    model, x = found[0], tokens()
    directions = directions_of_step(0, 0, 4 * EXAMPLES, "rademacher", REGIONS)
    made = MADE | {"per_example": True, "examples": EXAMPLES, "normalize": True}
    whole = estimated(of_regions(model), [x], theta, directions, **made)
    sent = []
    for start, stop in ((0, 1), (1, 3)):
        estimated(
            of_regions(model),
            [x[start:stop]],
            theta,
            directions,
            first_example=start,
            sum_over_ranks=kept(sent),
            **made,
        )
    # one loss for each: half of what both sides send
    assert len(sent[0]) == len(directions) * REGIONS
    added = [a + b for a, b in zip(*sent, strict=True)]
    shared = estimated(
        of_regions(model), [x[:1]], theta, directions, sum_over_ranks=lambda _: added, **made
    )
    assert shared.projected_grad == pytest.approx(whole.projected_grad, rel=1e-9)
    assert rms(whole.projected_grad, REGIONS) == pytest.approx(1.0)


def kept(sent):
    def note(values):
        sent.append(list(values))
        return list(values)

    return note


def test_one_bad_probe_spoils_the_step_and_clipping_bounds_it():
    _, scales = scaled_network()

    def of(*values):
        losses = iter(torch.tensor([value]) for value in values)
        directions = directions_of_step(0, 0, len(values), "rademacher")
        return estimated(
            lambda _: next(losses),
            [None],
            parametrize(scales, "layer"),
            directions,
            clip_threshold=1.0,
            **MADE,
        )

    assert not of(math.nan, 1.0, 2.0).finite
    assert of(1.0, 1.0, 2.0).projected_grad == (-1.0, -1.0, 1.0)
    assert all(of(1.0, 1.0, 2.0).clipped)


def test_a_direction_needs_others():
    model, scales = scaled_network()
    theta = parametrize(scales, "row")
    for count, made in (
        (1, {}),
        (3, {"per_example": True}),
        (5, {"per_example": True, "examples": 3}),
    ):
        with pytest.raises(ValueError, match="leave_one_out"):
            estimated(
                squared_output(model),
                [inputs(3)],
                theta,
                directions_of_step(0, 0, count, "rademacher"),
                **MADE,
                **made,
            )


@pytest.mark.parametrize("level", ["dense", "separable"])
def test_scales_are_what_they_were_when_the_objective_raises(level):
    model, scales = scaled_network("bnb")
    theta, before, calls = parametrize(scales, level), snapshot(model, scales), []

    def failing(x):
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return squared_output(model)(x)

    with pytest.raises(KeyboardInterrupt):
        estimated(
            failing,
            [inputs(2)],
            theta,
            [Direction(0, 0, index) for index in range(4)],
            probes_per_forward=1,
            **MADE,
        )
    assert_same(before, snapshot(model, scales))


def test_the_cosine_with_the_gradient_is_that_of_one_direction_less():
    model, scales = scaled_network("reference", width=64, out=2, blocksize=32)
    theta = parametrize(scales, "row")
    x, found = inputs(1, width=64), []
    exact = oracle.exact_gradient(squared_output(model), [x], theta, handles_of(model))
    for seed in range(300):
        directions = directions_of_step(seed, 0, 8, "rademacher")
        one = estimated(
            squared_output(model),
            [x],
            theta,
            directions,
            per_example=True,
            examples=1,
            **MADE | {"eps": 3e-3},
        )
        found.append(oracle.alignment(theta, one, exact))
    expected = math.sqrt(7 / (7 + len(exact["row"])))
    assert sum(one.cosine for one in found) / 300 == pytest.approx(expected, rel=0.05)
