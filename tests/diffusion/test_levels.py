"""Which noise levels of sampling use tuned scales, and the steps that these are in ComfyUI."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from qzo_diffusion.diffusion.families.sd3 import SD3
from qzo_diffusion.diffusion.levels import TunedBetween, in_comfyui, steps_between
from tests.quantized import assert_same, inputs, scaled_network, snapshot


class Transformer(nn.Module):
    """Calls a quantized network, whatever the level is."""

    in_channels = 16

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, hidden_states, timestep):
        return self.network(hidden_states)


def wrapped(levels, outside):
    return TunedBetween(Transformer(nn.Identity()), levels, outside, SD3.denoiser.level)


@pytest.mark.parametrize("levels", [(0.0, 1.0), (0.25, 0.7), (0.7, 1.0)])
def test_levels_inside_use_the_tuned_scales_and_all_others_the_bases(levels):
    opened = []

    @contextmanager
    def outside():
        opened.append(True)
        yield

    sampled = wrapped(levels, outside)
    for level in (0.0, 0.125, 0.25, 0.5, 0.75, 1.0):
        before = len(opened)
        sampled(hidden_states=torch.zeros(2), timestep=torch.full((2,), 1000 * level))
        assert (len(opened) == before) == (levels[0] <= level <= levels[1]), level


def test_the_wrapper_has_the_attributes_of_the_transformer():
    assert wrapped((0, 1), None).in_channels == 16
    with pytest.raises(AttributeError, match="nothing"):
        _ = wrapped((0, 1), None).nothing


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_tuned_scales_are_back_bit_for_bit_after_an_error_in_a_step_outside(error):
    model, live = scaled_network("bnb")
    base, untuned = {name: live[name].clone() for name in live}, model(inputs())

    def of(factor):
        return live.override(lambda names: {name: base[name] * factor for name in names})

    sampled = TunedBetween(Transformer(model), (0.0, 0.5), lambda: of(1), SD3.denoiser.level)
    below, above = torch.tensor([500.0]), torch.tensor([501.0])
    before = snapshot(model, live)
    with of(1.5):  # as in a run, whose theta is not merged
        tuned = model(inputs())
        assert torch.equal(sampled(hidden_states=inputs(), timestep=below), tuned)
        assert torch.equal(sampled(hidden_states=inputs(), timestep=above), untuned)

        def fail(*_):
            raise error

        hook = model[-1].register_forward_pre_hook(fail)
        with pytest.raises(error):
            sampled(hidden_states=inputs(), timestep=above)
        hook.remove()
        assert torch.equal(sampled(hidden_states=inputs(), timestep=below), tuned)
    assert not torch.equal(tuned, untuned)
    assert_same(before, snapshot(model, live))


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("levels", [(0.0, 1.0), (0.0, 0.7), (0.3, 0.7), (0.999, 1.0)])
def test_the_steps_of_comfyui_are_those_whose_level_lies_inside(levels, shift):
    steps = 28
    start, end = steps_between(levels, steps, shift)
    for step in range(steps):
        # ComfyUI's scheduler: every (1000 / steps)-th of 1,000 shifted levels, from the last one
        index = 999 - int(step * 1000 / steps)
        level = shift * (index + 1) / 1000 / (1 + (shift - 1) * (index + 1) / 1000)
        if all(abs(level - end_of) > 1e-2 for end_of in levels):  # it rounds to thousandths
            assert (start <= step < end) == (levels[0] <= level <= levels[1]), step


def test_the_table_has_a_row_for_each_model_in_turn():
    for levels, rows in (
        ((0.0, 1.0), ["this one | enable | 0 | 28 | disable"]),
        (
            (0.0, 0.7),
            ["the base | enable | 0 | 9 | enable", "this one | disable | 9 | 28 | disable"],
        ),
        (
            (0.3, 0.7),
            [
                "the base | enable | 0 | 9 | enable",
                "this one | disable | 9 | 20 | enable",
                "the base | disable | 20 | 28 | disable",
            ],
        ),
    ):
        found = in_comfyui(levels, 28, 1.0).splitlines()[-len(rows) - 1 :]
        assert found[0] == "|---|---|---|---|---|"
        assert found[1:] == [f"| {row} |" for row in rows]
