"""A direction of its own for every example: the same numbers as one example at a time, and the
gradient on average.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qzo_diffusion.core.activation_scaling import (
    LayerScaling,
    ScaledLayer,
    _scale_at_once,
    _scale_by_parts,
)
from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.core.noise import Direction, directions_of_step
from qzo_diffusion.core.optimizer import Update, gradient_of
from qzo_diffusion.core.parametrize import parametrize
from tests.core.seeds import averaged_over
from tests.quantized import assert_same, estimated, inputs, scaled_network, snapshot, squared_output

GAINED = ["row", "layer", "column", "separable"]


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
@pytest.mark.parametrize("level", GAINED)
@pytest.mark.parametrize("backend", ["reference", "bnb"])
def test_each_example_sees_what_its_direction_does_to_the_scales(backend, level, distribution):
    model, scales = scaled_network(backend)
    theta = parametrize(scales, level)
    theta.move_([Direction(9, 0)], [0.05])
    x = inputs(4)
    directions = directions_of_step(0, 0, 4, distribution)
    with torch.no_grad():
        with scales.override(*theta.probes(directions, [0.02])):
            together = model(x)
        for index, direction in enumerate(directions):
            with scales.override(theta.perturbed(direction, 0.02)):
                alone = model(x[index : index + 1])
            # Two layers of products of 128 terms and a handful of single roundings, each 2^-24 of
            # the largest output.
            torch.testing.assert_close(
                together[index : index + 1],
                alone,
                rtol=0,
                atol=4 * 128 * 2**-24 * alone.abs().max().item(),
            )


@pytest.mark.parametrize("level", GAINED)
def test_derivatives_are_those_of_the_examples_one_at_a_time(level):
    model, scales = scaled_network(dtype=torch.float64)
    theta = parametrize(scales, level)
    x, directions = inputs(5, dtype=torch.float64), directions_of_step(0, 0, 5, "rademacher")
    found = estimated(
        squared_output(model), list(x.split(2)), theta, directions, eps=1e-2, per_example=True
    )
    for index, direction in enumerate(directions):
        single = estimated(
            squared_output(model), [x[index : index + 1]], theta, [direction], eps=1e-2
        )
        assert found.directional_derivative[index] == pytest.approx(
            single.directional_derivative[0], rel=1e-9
        )


@pytest.mark.parametrize("probes_per_forward", [None, 1])
def test_several_directions_of_each_example_are_as_many_estimates(probes_per_forward):
    """Also where this process has examples 2 to 4 of a batch of 6."""
    model, scales = scaled_network(dtype=torch.float64)
    theta = parametrize(scales, "separable")
    x, directions = inputs(3, dtype=torch.float64), directions_of_step(0, 0, 12, "rademacher")
    made = {
        "eps": 1e-2,
        "per_example": True,
        "first_example": 2,
        "examples": 6,
        "probes_per_forward": probes_per_forward,
    }
    found = estimated(squared_output(model), list(x.split(2)), theta, directions, **made)
    assert len(found.directional_derivative) == 12
    for index, direction in enumerate(directions):
        if 2 <= index % 6 < 5:
            single = estimated(
                squared_output(model),
                [x[index % 6 - 2 : index % 6 - 1]],
                theta,
                [direction],
                eps=1e-2,
            )
            assert found.directional_derivative[index] == pytest.approx(
                single.directional_derivative[0], rel=1e-9
            )
        else:
            assert found.loss_plus[index] == found.loss_minus[index] == 0.0


def test_two_directions_have_half_the_variance_of_one():
    """Where examples are alike: what is left then is that directions are few."""
    model, scales = scaled_network(dtype=torch.float64)
    theta = parametrize(scales, "row")
    x = inputs(1, dtype=torch.float64).repeat(4, 1)
    variances = []
    for each in (1, 2):
        found = []
        for seed in range(400):
            directions = directions_of_step(seed, 0, 4 * each, "rademacher")
            one = estimated(
                squared_output(model),
                [x],
                theta,
                directions,
                eps=1e-3,
                per_example=True,
                examples=4,
            )
            found.append(
                gradient_of(theta, Update(directions, one.directional_derivative, lr=1.0), "row")
            )
        variances.append(torch.stack(found).var(0).sum())
    # over some 100 rows, each known to 7 % from 400 seeds
    assert variances[0] / variances[1] == pytest.approx(2, rel=0.15)


@averaged_over(150, 600)
@pytest.mark.parametrize("level", GAINED)
def test_the_mean_over_seeds_is_the_gradient(level, seeds):
    model, scales = scaled_network(width=64, out=2, dtype=torch.float64, blocksize=32)
    theta = parametrize(scales, level)
    x = inputs(8, width=64, dtype=torch.float64)
    exact = exact_gradient(model, scales, theta, x)
    samples = {axis: [] for axis in theta.by_axis}
    for seed in range(seeds):
        directions = directions_of_step(seed, 0, 8, "rademacher")
        found = estimated(squared_output(model), [x], theta, directions, eps=1e-3, per_example=True)
        update = Update(directions, found.directional_derivative, lr=1.0)
        for axis in samples:
            samples[axis].append(gradient_of(theta, update, axis))
    for axis, values in samples.items():
        stacked = torch.stack(values)
        deviation = (stacked.mean(0) - exact[axis]).abs() / (stacked.std(0) / seeds**0.5)
        assert deviation.max() < 5, axis


def exact_gradient(model, scales, theta, x):
    """By autograd through the scales, summed over each group."""
    exact = {axis: [] for axis in theta.by_axis}
    for name in scales:
        layer = model.get_submodule(name)
        live = layer.absmax
        layer.absmax = live.clone().requires_grad_()
        squared_output(model)(x).mean().backward()
        of_scales = (layer.absmax.grad * live).view(scales.rows(name), -1)
        layer.absmax = live
        sums = {
            "row": of_scales.sum(1),
            "column": of_scales.sum(0),
            "layer": of_scales.sum().view(1),
        }
        for axis, parts in exact.items():
            parts.append(sums[axis])
    return {axis: torch.cat(parts) for axis, parts in exact.items()}


def test_it_has_less_variance_than_one_shared_direction():
    model, scales = scaled_network(dtype=torch.float64)
    theta = parametrize(scales, "row")
    x = inputs(16, dtype=torch.float64)
    shared, own = [], []
    for seed in range(60):
        for kept, count in ((shared, 1), (own, 16)):
            directions = directions_of_step(seed, 0, count, "rademacher")
            found = estimated(
                squared_output(model), [x], theta, directions, eps=1e-3, per_example=count > 1
            )
            kept.append(
                gradient_of(theta, Update(directions, found.directional_derivative, lr=1.0), "row")
            )
    ratio = torch.stack(shared).var(0).sum() / torch.stack(own).var(0).sum()
    # 16 · |mean gradient|² / mean |example's gradient|² in expectation, which is less than 16
    assert ratio > 3


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_nothing_changes_and_no_factor_stays(error):
    model, scales = scaled_network("bnb")
    theta = parametrize(scales, "row")
    before, plain = snapshot(model, scales), model(inputs())

    def broken(x):
        model(x)
        raise error

    with pytest.raises(type(error)):
        estimated(
            broken,
            [inputs()],
            theta,
            directions_of_step(0, 0, 6, "rademacher"),
            eps=1e-2,
            per_example=True,
        )
    assert_same(before, snapshot(model, scales))
    assert torch.equal(plain, model(inputs()))


def test_dense_numbers_have_no_factor_of_outputs():
    _, scales = scaled_network()
    with pytest.raises(ValueError, match="only rows, columns and layers"):
        parametrize(scales, "dense").probes([Direction(0, 0)], [1e-2, -1e-2])


def gained(product, bias, layer_scaling, dtype=torch.float32):
    """What a quantized layer gives for `product + bias` under a gain."""
    output = product.to(dtype, copy=True)
    ScaledLayer("layer", LayerScaling(output=layer_scaling), bias).scale_output_(output)
    return output


@pytest.mark.parametrize("shape", [(6, 8), (6, 5, 8), (6, 2, 5, 8)])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_gain_leaves_the_bias_alone_in_any_shape(shape, groups):
    generator = torch.Generator().manual_seed(0)
    product, bias = torch.randn(shape, generator=generator), torch.randn(8, generator=generator)
    layer_scaling = torch.rand(groups, 8, generator=generator)
    of_example = layer_scaling.repeat_interleave(6 // groups, 0).view(
        6, *(1,) * (len(shape) - 2), 8
    )
    torch.testing.assert_close(gained(product, bias, layer_scaling), product * of_example + bias)


def test_a_small_gain_is_not_lost_in_bfloat16():
    """1.01 alone rounds to 1.0078 there; the product is formed in fp32 and rounded once."""
    value, layer_scaling = torch.tensor([[1.9921875]], dtype=torch.bfloat16), torch.tensor([[1.01]])
    scaled = gained(value, None, layer_scaling, torch.bfloat16)
    assert torch.equal(scaled, (value.float() * layer_scaling).bfloat16())
    assert not torch.equal(scaled, value * layer_scaling.bfloat16())


@pytest.mark.parametrize(
    "x",
    [
        inputs(6),
        # a layer that runs once for all: its tokens divide into as many runs, but are not theirs
        inputs(8).unsqueeze(0),
    ],
    ids=["other examples", "once for all"],
)
def test_examples_that_do_not_fit_the_groups_are_refused(x):
    model, scales = scaled_network()
    theta = parametrize(scales, "row")
    probes = theta.probes(directions_of_step(0, 0, 4, "rademacher"), [0.01])
    with pytest.raises(ModelError, match="4 groups are probed"), scales.override(*probes):
        model(x)


def test_a_bias_that_cannot_be_taken_off_is_refused():
    model, scales = scaled_network()
    del model[0].bias
    model[0].register_buffer("bias", torch.zeros(128))
    theta = parametrize(scales, "row")
    probes = theta.probes(directions_of_step(0, 0, 4, "rademacher"), [0.01])
    with pytest.raises(ModelError, match="0 has a bias that is a Tensor"), scales.override(*probes):
        model(inputs(4))
    columns = parametrize(scales, "column").probes(
        directions_of_step(0, 0, 4, "rademacher"), [0.01]
    )
    with torch.no_grad(), scales.override(*columns):  # inputs are scaled, and no bias with them
        assert model(inputs(4)).isfinite().all()


@pytest.mark.parametrize("level", GAINED)
def test_both_signs_in_one_forward_are_what_two_forwards_give(level):
    model, scales = scaled_network(dtype=torch.float64)
    theta = parametrize(scales, level)
    theta.move_([Direction(5, 5)], [0.1])
    x, directions = inputs(5, dtype=torch.float64), directions_of_step(0, 0, 5, "rademacher")
    for per_example, chosen in ((True, directions), (False, directions[:2])):
        together, apart = (
            estimated(
                squared_output(model),
                list(x.split(2)),
                theta,
                chosen,
                eps=1e-2,
                per_example=per_example,
                probes_per_forward=both,
            )
            for both in (None, 1)
        )
        assert together.loss_plus == pytest.approx(apart.loss_plus, rel=1e-12)
        assert together.loss_minus == pytest.approx(apart.loss_minus, rel=1e-12)


def test_a_batch_that_can_not_be_repeated_is_run_twice():
    model, scales = scaled_network()
    calls = []

    def objective(batch):
        calls.append(len(batch["x"]))
        return squared_output(model)(batch["x"])

    found = estimated(
        objective, [{"x": inputs(4)}], parametrize(scales, "row"), [Direction(0, 0)], eps=1e-2
    )
    assert calls == [4, 4]
    assert found.directional_derivative[0] != 0


def test_one_loss_for_a_whole_batch_is_probed_by_two_forwards():
    model, scales = scaled_network(dtype=torch.float64)
    x, direction = inputs(dtype=torch.float64), Direction(0, 0)
    found = [
        estimated(
            objective, [x], parametrize(scales, "row"), [direction], eps=1e-2
        ).directional_derivative[0]
        for objective in (squared_output(model), lambda batch: squared_output(model)(batch).mean())
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def test_examples_with_directions_of_their_own_need_a_loss_each():
    model, scales = scaled_network()
    directions = directions_of_step(0, 0, 6, "rademacher")
    with pytest.raises(ValueError, match="1 losses for 6 examples"):
        estimated(
            lambda x: model(x).mean(),
            [inputs()],
            parametrize(scales, "row"),
            directions,
            eps=1e-2,
            per_example=True,
        )


@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, 8)])
def test_a_gain_in_one_pass_is_the_one_by_parts_bit_for_bit(bias, monkeypatch):
    """What a GPU is told to do in 16 bits, and what a CPU does."""
    monkeypatch.setattr("qzo_diffusion.core.activation_scaling.AT_ONCE", 40)
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(6, 5, 8, generator=generator).bfloat16()
    factor = 1 + torch.rand(6, 1, 8, generator=generator) / 10
    at_once, by_parts = torch.empty_like(tensor), torch.empty_like(tensor)
    _scale_at_once(tensor, factor, bias, at_once)
    _scale_by_parts(tensor, factor, bias, by_parts)
    assert torch.equal(at_once, by_parts)
    _scale_at_once(tensor, factor, bias, tensor)
    assert torch.equal(tensor, by_parts)


class Operations(TorchDispatchMode):
    """Counts what is more than another view of a tensor: on a GPU each is a launch."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.count += (
            not function.is_view
            and "empty" not in str(function)
            and "_unsafe_view" not in str(function)
        )
        return found


@pytest.mark.parametrize("tokens", [4, 64])
def test_a_gain_is_one_operation_on_a_device_that_converts_on_its_way(tokens):
    x = torch.empty(4, tokens, 128, dtype=torch.bfloat16, device="meta")
    y = torch.empty(4, tokens, 96, dtype=torch.bfloat16, device="meta")
    layer_scaling = LayerScaling(
        torch.empty(4, 96, device="meta"), torch.empty(4, 2, device="meta")
    )
    with Operations() as counted:
        factors = ScaledLayer(
            "layer", layer_scaling, torch.empty(96, dtype=torch.bfloat16, device="meta")
        )
    assert counted.count == 0
    with Operations() as counted:
        factors.scale_input(x)
    assert counted.count == 1
    with Operations() as counted:
        factors.scale_output_(y)
    assert counted.count == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3, 16, 40])
def test_inputs_are_scaled_block_by_block_for_few_and_for_many_tokens(tokens, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, tokens, 24, generator=generator).to(dtype)
    factor = 1 + torch.rand(2, 3, generator=generator) / 10
    scaled = ScaledLayer("layer", LayerScaling(input=factor), None).scale_input(x)
    expected = x.float() * factor.repeat_interleave(2, 0).repeat_interleave(8, 1).unsqueeze(1)
    assert torch.equal(scaled, expected.to(dtype))
