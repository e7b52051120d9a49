import pytest
import torch

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.core.merge import merge_changes_
from qzo_diffusion.core.noise import Direction
from tests.quantized import scaled_network


def base_and_tuned(radius=0.1, seed=0):
    _, scales = scaled_network(dtype=torch.float64)
    base = {name: scales[name].clone() for name in scales}
    tuned = {
        name: tensor * Direction(seed, 0).exp_z(name, tensor, radius)
        for name, tensor in base.items()
    }
    return scales, base, tuned


def test_strength_one_is_the_tuned_model_and_zero_the_base_bit_for_bit():
    scales, base, tuned = base_and_tuned()
    merge_changes_(scales, [(tuned, 0.0)])
    assert all(torch.equal(scales[name], base[name]) for name in scales)
    merge_changes_(scales, [(tuned, 1.0)])
    assert all(torch.equal(scales[name], tuned[name]) for name in scales)


@pytest.mark.parametrize("strength", [0.25, 0.5, 1.5, -1.0])
def test_other_strengths_are_on_a_straight_line_of_log_scales(strength):
    scales, base, tuned = base_and_tuned()
    merge_changes_(scales, [(tuned, strength)])
    for name in scales:
        expected = strength * torch.log(tuned[name] / base[name])
        torch.testing.assert_close(
            torch.log(scales[name] / base[name]), expected, rtol=1e-12, atol=1e-12
        )


def test_two_runs_mix_by_adding_their_changes():
    scales, base, first = base_and_tuned()
    _, _, second = base_and_tuned(radius=0.2, seed=1)
    merge_changes_(scales, [(first, 0.7), (second, 0.3)])
    for name in scales:
        expected = 0.7 * torch.log(first[name] / base[name]) + 0.3 * torch.log(
            second[name] / base[name]
        )
        torch.testing.assert_close(
            torch.log(scales[name] / base[name]), expected, rtol=1e-12, atol=1e-12
        )


def test_negative_scales_are_mixed_by_their_logarithms_too():
    _, scales = scaled_network("reference", "bof4s")
    base = {name: scales[name].clone() for name in scales}
    tuned = {
        name: tensor * Direction(0, 0).exp_z(name, tensor, 0.1) for name, tensor in base.items()
    }
    merge_changes_(scales, [(tuned, 0.5)])
    for name in scales:
        assert (base[name] < 0).any()
        torch.testing.assert_close(scales[name], base[name] * (tuned[name] / base[name]).sqrt())


def test_a_negative_scale_that_was_tuned_to_zero_stays_on_its_side():
    _, scales = scaled_network("reference", "bof4s")
    place = int((scales["0"] < 0).nonzero()[0])
    before = scales["0"][place].item()
    tuned = {name: scales[name].clone() for name in scales}
    tuned["0"][place] = 0.0
    merge_changes_(scales, [(tuned, 0.5)])
    assert scales["0"][place] == pytest.approx(before / 2)
    merge_changes_(scales, [(tuned, 3.0)])
    assert scales["0"][place] == 0


def test_zeros_stay_finite():
    scales, _, tuned = base_and_tuned()
    scales["0"][0] = 0.0
    tuned["0"][0], tuned["0"][1] = 0.5, 0.0
    before = scales["0"][1].item()
    merge_changes_(scales, [(tuned, 0.5)])
    assert scales["0"][0] == 0.25
    assert scales["0"][1] == pytest.approx(before / 2)
    assert all(torch.isfinite(scales[name]).all() for name in scales)


def test_scales_of_another_model_are_refused():
    scales, _, tuned = base_and_tuned()
    with pytest.raises(ModelError, match="do not fit"):
        merge_changes_(scales, [({"elsewhere": torch.ones(1)}, 1.0)])
    with pytest.raises(ModelError, match="do not fit"):
        merge_changes_(scales, [({name: tensor[:-1] for name, tensor in tuned.items()}, 1.0)])
