"""Which numbers move, and by how much."""

from decimal import Decimal

import pytest
import torch

from qzo_diffusion.core.noise import Direction
from qzo_diffusion.core.parametrization import exp
from qzo_diffusion.core.parametrize import parametrize
from tests.quantized import inputs, scaled_network

LEVELS = [
    ("dense", "absolute"),
    *((level, "relative") for level in ("dense", "row", "layer", "column", "separable")),
]
DIRECTION = Direction(0, 0)


def copies(scales):
    return {name: scales[name].clone() for name in scales}


def test_dense_relative_multiplies_by_the_exponential():
    _, scales = scaled_network(dtype=torch.float64)
    before, theta = copies(scales), parametrize(scales, "dense")
    theta.move_([DIRECTION], [0.03])
    for name in scales:
        moved = torch.log(scales[name] / before[name])
        torch.testing.assert_close(moved, 0.03 * DIRECTION.z(name, moved), rtol=1e-12, atol=1e-12)


def test_the_exponential_is_the_nearest_number_of_fp32_as_on_any_machine():
    """That of fp32 is not, and another one on a GPU: a journal would give other scales there."""
    theta = torch.randn(500, generator=torch.Generator().manual_seed(0)) / 4
    exact = torch.tensor(
        [float(Decimal(number).exp()) for number in theta.tolist()], dtype=torch.float64
    )
    assert torch.equal(exp(theta), exact.float())
    assert not torch.equal(torch.exp(theta), exact.float())


def test_dense_relative_keeps_scales_positive_however_far_it_moves():
    _, scales = scaled_network()
    theta = parametrize(scales, "dense")
    theta.move_([DIRECTION], [20.0])
    assert all((scales[name] > 0).all() for name in scales)


def test_dense_absolute_adds_and_stops_at_zero():
    _, scales = scaled_network()
    before, theta = copies(scales), parametrize(scales, "dense", "absolute")
    theta.move_([DIRECTION], [-0.2])
    for name in scales:
        moved = before[name] + (-0.2 * DIRECTION.z(name, before[name]))
        assert torch.equal(scales[name], moved.clamp(min=0))
    assert any((scales[name] == 0).any() for name in scales)


def test_dense_absolute_stops_negative_scales_at_zero_too():
    _, scales = scaled_network("reference", "bof4s")
    before, theta = copies(scales), parametrize(scales, "dense", "absolute")
    theta.move_([DIRECTION, DIRECTION], [-1.0, 1.0])  # to zero or beyond, then back
    stopped = {
        name: (before[name] - DIRECTION.z(name, before[name])) * before[name].sign() <= 0
        for name in scales
    }
    for name in scales:
        assert (scales[name] * before[name].sign() >= 0).all()
        assert before[name].sign().unique().tolist() == [-1, 1]
        moved = DIRECTION.z(name, before[name])
        came_back = stopped[name] & (moved * before[name].sign() > 0)
        assert came_back.any()
        assert torch.equal(scales[name][came_back], moved[came_back])


def test_per_layer_moves_one_number_and_no_scale_until_merged():
    model, scales = scaled_network()
    before, theta = copies(scales), parametrize(scales, "layer")
    theta.move_([DIRECTION], [0.1])
    assert all(torch.equal(before[name], scales[name]) for name in scales)
    with scales.override(theta.perturbed()):
        viewed = model(inputs())
    of_layer = {name: theta.of_layer("layer", name).clone() for name in scales}
    theta.merge_()
    assert torch.equal(viewed, model(inputs()))
    assert torch.equal(
        torch.cat(list(of_layer.values())), 0.1 * DIRECTION.z("layer", torch.empty(2))
    )
    for name in scales:
        assert torch.equal(scales[name], before[name] * torch.exp(of_layer[name]))
    assert not theta.by_axis["layer"].any()


@pytest.mark.parametrize(("level", "units"), LEVELS)
def test_a_view_at_radius_r_is_what_moving_by_r_gives(level, units):
    """Estimator and update speak of the same numbers."""
    model, scales = scaled_network(dtype=torch.float64)
    theta = parametrize(scales, level, units)
    x = inputs(dtype=torch.float64)
    with scales.override(theta.perturbed(DIRECTION, 0.01)):
        viewed = model(x)
    theta.move_([DIRECTION], [0.01])
    with scales.override(theta.perturbed()):
        moved = model(x)
    torch.testing.assert_close(viewed, moved, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("level", "units"), LEVELS)
def test_moving_is_adding_z(level, units):
    _, moved = scaled_network(dtype=torch.float64)
    _, added = scaled_network(dtype=torch.float64)
    theta, others = parametrize(moved, level, units), parametrize(added, level, units)
    theta.move_([DIRECTION], [-0.02])
    for name in others.templates():
        others.add_(name, others.combined(name, [DIRECTION], [-0.02]))
    theta.merge_()
    others.merge_()
    for name in moved:
        torch.testing.assert_close(moved[name], added[name], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(("level", "units"), LEVELS)
def test_state_brings_the_numbers_back(level, units):
    _, scales = scaled_network()
    theta = parametrize(scales, level, units)
    theta.move_([DIRECTION], [0.05])
    state = {name: tensor.clone() for name, tensor in theta.state().items()}
    _, fresh = scaled_network()
    restored = parametrize(fresh, level, units)
    restored.load_state_(state)
    theta.merge_()
    restored.merge_()
    assert all(torch.equal(scales[name], fresh[name]) for name in scales)


def test_state_of_another_model_is_refused():
    _, scales = scaled_network()
    for state in ({"elsewhere": torch.zeros(2)}, {"layer": torch.zeros(3)}):
        with pytest.raises(ValueError, match="another parametrization"):
            parametrize(scales, "layer").load_state_(state)


def test_absolute_units_need_dense_numbers():
    _, scales = scaled_network()
    with pytest.raises(ValueError, match="dense"):
        parametrize(scales, "layer", "absolute")
