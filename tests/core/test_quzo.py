"""Codes on a grid: rounding and estimate against theory, moves within the range, feedback against
its definition in float64.
"""

import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from qzo_diffusion.core import quzo
from qzo_diffusion.core.noise import Direction, directions_of_step
from qzo_diffusion.core.optimizer import Sgd, Update
from qzo_diffusion.core.quzo import Codes, ErrorFeedback, Move
from qzo_diffusion.core.rounding import stochastic_round
from qzo_diffusion.core.scales import ScaleSet
from qzo_diffusion.quant.intgrid import CodesHandle, Int8Grid, IntGridLinear
from qzo_diffusion.quant.load import find_codes
from tests.core.seeds import averaged_over
from tests.quantized import assert_same, estimated, inputs, network, snapshot, squared_output

KINDS = ["int8", "int4", "fp8"]


def grid_network(kind="int8", **options):
    model = network("intgrid", kind, 32, **options)
    return model, *find_codes(model)


def one_layer(start, seed=0, distribution="rademacher"):
    """A layer of int8 codes with a scale that makes a code worth one, and its numbers."""
    layer = IntGridLinear(
        torch.tensor([start], dtype=torch.int8), torch.tensor([127.0]), None, "int8", "float"
    )
    return layer, Codes(ScaleSet([CodesHandle("w", layer)], (torch.int8,)), {"w": Int8Grid()})


def within(samples, expected, errors=5.0):
    """Whether the mean of samples [n, ...] is as expected, in standard errors."""
    error = samples.std(0) / math.sqrt(len(samples))
    return bool(((samples.mean(0) - expected).abs() <= errors * error + 1e-12).all())


@pytest.mark.parametrize("x", [0.3, -0.3, 1e-4, -1e-4, 2.75, -2.75, 0.5, 4.0, 0.0])
def test_rounding_is_right_on_average_and_takes_one_of_the_neighbours(x):
    count = 2_000_000
    rounded = stochastic_round(torch.full((count,), x), "test", str(x)).double()
    assert set(rounded.unique().tolist()) <= {float(math.floor(x)), float(math.ceil(x))}
    assert within(rounded[:, None], torch.tensor(x, dtype=torch.float64))


@hypothesis.given(
    st.lists(st.floats(-130, 130, width=32), min_size=1, max_size=50), st.integers(0, 2**31)
)
def test_rounding_never_leaves_the_neighbours_and_is_the_same_again(values, seed):
    x = torch.tensor(values)
    rounded = stochastic_round(x.clone(), seed)
    assert ((rounded - x).abs() < 1).all()
    assert torch.equal(rounded, stochastic_round(x.clone(), seed))


@pytest.mark.parametrize(
    ("distribution", "eps"), [("gaussian", 0.7), ("gaussian", 1.5), ("rademacher", 0.3)]
)
def test_the_two_roundings_are_independent(distribution, eps):
    """E[p Q2(u)] / ε = 1 for a number and 0 between two; p with itself in place of Q2 would not
    give that.
    """
    layer, theta = one_layer([0] * 40_000)
    first, twice = [], []
    for seed in range(30):
        direction = Direction(seed, 0, 0, distribution)
        p = theta.perturbed(direction, eps)(["w"])["w"].double().flatten()
        u2 = theta.combined("w", [direction], [1.0]).double().flatten()
        first.append(torch.stack([(p * u2) / eps, (p * u2.roll(1)) / eps], 1))
        twice.append((p / eps).square())
    assert within(torch.cat(first), torch.tensor([1.0, 0.0]).double())
    assert not within(torch.cat(twice)[:, None], torch.tensor(1.0).double())
    assert layer.codes.count_nonzero() == 0


@averaged_over(1000, 4000)
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_the_estimate_is_unbiased_on_a_quadratic(distribution, seeds):
    start = [3, -7, 20, 0, 11, -40]
    layer, theta = one_layer(start)
    curvature, goal = (
        torch.tensor([1.0, 0.5, 2.0, 0.1, 3.0, 0.2]),
        torch.tensor([0.0, 1.0, 15.0, -5.0, 12.0, -20.0]),
    )

    def loss(batch):
        return 0.5 * (curvature * (layer.codes.float() - goal).square()).sum(-1).expand(len(batch))

    found = []
    for seed in range(seeds):
        direction = Direction(seed, 0, 0, distribution)
        one = estimated(loss, [torch.zeros(1)], theta, [direction], eps=0.6)
        mu = one.directional_derivative[0]
        found.append(mu * theta.combined("w", [direction], [1.0])[0].double())
    assert within(torch.stack(found), (curvature * (torch.tensor(start) - goal)).double())


def test_the_spread_of_the_probe_grows_as_one_over_eps():
    """Var(p / ε): 1 / ε below one code, and 1 from there on; the probe in floating point has 1
    everywhere.
    """
    _, theta = one_layer([0] * 200_000)
    _, plain = one_layer([0] * 200_000)
    plain = Codes(plain.scales, {"w": Int8Grid()}, probe="float")
    for eps in (0.05, 0.2, 0.5, 1.0):
        p = theta.perturbed(Direction(0, 0), eps)(["w"])["w"].double() / eps
        assert p.square().mean().item() == pytest.approx(1 / eps, rel=0.05)
        assert plain.perturbed(Direction(0, 0), eps)(["w"])["w"].div(
            eps
        ).square().mean().item() == pytest.approx(1.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("probe", ["codes", "float"])
def test_probes_leave_the_codes_as_they_were_also_after_an_exception(kind, probe):
    if (kind, probe) == ("fp8", "float"):
        pytest.skip("fp8 has no numbers between its codes; the config refuses it")
    model, scales, grids = grid_network(kind)
    theta, before = Codes(scales, grids, probe=probe), snapshot(model, scales)
    seen = []
    with torch.no_grad(), scales.override(theta.perturbed(Direction(0, 0), 1.0)):
        seen.append(model(inputs()))
    assert not torch.equal(seen[0], model(inputs()))

    def interrupted():
        with scales.override(theta.perturbed(Direction(0, 0), -1.0)):
            model(inputs())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert_same(before, snapshot(model, scales))


@pytest.mark.parametrize("kind", KINDS)
def test_moves_stay_in_the_range_and_change_only_what_they_say(kind, monkeypatch):
    monkeypatch.setattr(quzo, "BLOCK", 512)  # several blocks a layer
    _, scales, grids = grid_network(kind, seed=3)
    grid, theta = grids["0"], Codes(scales, grids, trained=["0"])
    before = {name: grids[name].codes(scales[name]) for name in scales}
    direction = Direction(7, 2)
    wanted = theta.combined("0", [direction], [1.0])
    theta.move_([direction], [40.0])
    after = {name: grids[name].codes(scales[name]) for name in scales}
    gated = (before["0"] + 40 * wanted > grid.high) | (before["0"] + 40 * wanted < grid.low)
    assert torch.equal(after["0"], torch.where(gated, before["0"], before["0"] + 40 * wanted))
    assert torch.equal(after["2"], before["2"])
    assert gated.any()
    for _ in range(5):
        theta.move_([direction], [3.5])
    codes = grid.codes(scales["0"])
    assert codes.min() >= grid.low
    assert codes.max() <= grid.high
    assert torch.equal(grid.stored(codes), scales["0"])


def test_a_small_move_is_right_on_average():
    layer, theta = one_layer([0] * 400_000)
    direction = Direction(1, 0)
    theta.move_([direction], [0.01])
    u = theta.combined("w", [direction], [1.0])[0]
    assert within((layer.codes[0].float() * u).double()[:, None], torch.tensor(0.01).double())


def test_feedback_is_what_its_definition_says(monkeypatch):
    monkeypatch.setattr(quzo, "BLOCK", 256)
    layer, theta = one_layer([5] * 1000)
    feedback, generator = (
        ErrorFeedback(decay=0.8, steps=50, rms_decay=0.7),
        torch.Generator().manual_seed(0),
    )
    codes, left = torch.full((1000,), 5.0).double(), torch.zeros(1000).double()
    square = weight = 0.0
    for step in range(30):
        directions = directions_of_step(3, step, 2, "rademacher")
        scalars = tuple(torch.randn(2, generator=generator).tolist())
        feedback.step_(theta, Update(directions, scalars, 0.3))
        square = 0.7 * square + 0.3 * (scalars[0] ** 2 + scalars[1] ** 2) / 2
        weight = 0.7 * weight + 0.3
        unit = (square / weight) ** 0.5
        wanted = (
            theta.combined("w", directions, [-0.3 * g / 2 / unit for g in scalars])[0].double()
            + 0.8 * left
        )
        left = wanted - wanted.round()
        codes += wanted.round()
    assert torch.equal(layer.codes[0].double(), codes)
    assert codes.unique().numel() > 2


def test_feedback_moves_what_rounding_alone_would_lose():
    """A steady slope of 0.08 of a code a step: 0.8 of one where γ = 0.9 has summed it up, nothing
    without feedback.
    """
    layer, theta = one_layer([0] * 100)
    same = Direction(0, 0)
    feedback = ErrorFeedback(decay=0.9, steps=30)
    for _ in range(40):
        feedback.step_(theta, Update((same,), (1.0,), 0.08))
    u = theta.combined("w", [same], [1.0])[0]
    assert ((layer.codes[0] * -u) >= 1).all()
    _, lost = one_layer([0] * 100)
    lost.move_with_feedback_([], Move((same,), (0.08,)), 0.9)
    assert lost.scales["w"].count_nonzero() == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [Sgd, lambda: ErrorFeedback(0.9, 4)])
def test_a_run_goes_on_from_its_state_and_replays_bit_for_bit(kind, make):
    def run(first, last, model, optimizer):
        scales, grids = find_codes(model)
        theta = Codes(scales, grids)
        for step in range(first, last):
            directions = directions_of_step(5, step, 2, "gaussian" if step % 2 else "rademacher")
            optimizer.step_(theta, Update(directions, (1.0 + step, -2.0), 0.2))
        return scales

    whole, optimizer = network("intgrid", kind, 32), make()
    base = {name: tensor.clone() for name, tensor in find_codes(whole)[0].tensors().items()}
    run(0, 6, whole, optimizer)
    halted, first = network("intgrid", kind, 32), make()
    run(0, 3, halted, first)
    second = make()
    second.load_state_({name: tensor.clone() for name, tensor in first.state().items()})
    run(3, 6, halted, second)
    one, other = (find_codes(model)[0].tensors() for model in (whole, halted))
    assert all(
        torch.equal(one[name], other[name]) and not torch.equal(one[name], base[name])
        for name in one
    )


@pytest.mark.parametrize("counts", [(1, 1, 2, 2), (3, 1, 2, 1)])
def test_steps_of_other_numbers_of_directions_are_kept_too(counts):
    """As after `--resume --force qzo.num_directions=2`."""
    _, theta = one_layer([0] * 500)
    _, other = one_layer([0] * 500)
    whole, parts = ErrorFeedback(0.9, 4), ErrorFeedback(0.9, 4)
    for step, count in enumerate(counts):
        directions = directions_of_step(3, step, count, "gaussian" if step % 2 else "rademacher")
        update = Update(directions, (1.5, -2.0, 0.5)[:count], 0.3)
        whole.step_(theta, update)
        parts.step_(other, update)
        state = {name: tensor.clone() for name, tensor in parts.state().items()}
        parts = ErrorFeedback(0.9, 4)
        parts.load_state_(state)
    assert parts._past == whole._past
    assert torch.equal(theta.scales["w"], other.scales["w"])


def test_what_codes_cannot_do_is_refused():
    model, scales, grids = grid_network()
    theta = Codes(scales, grids)
    update = Update((Direction(0, 0),), (1.0,), 0.1)
    with pytest.raises(ValueError, match="sgd or feedback"):
        theta.add_("0", torch.zeros(1))
    with pytest.raises(ValueError, match="only rows, columns and layers"):
        theta.probes([Direction(0, 0)], [1.0, -1.0])
    with pytest.raises(ValueError, match="integer codes"):
        ErrorFeedback().step_(object(), update)
    with pytest.raises(ValueError, match="does not scale activations"):
        estimated(
            squared_output(model), [inputs()], theta, [Direction(0, 0)], eps=1.0, per_example=True
        )
