"""Some layers trained, the others untouched and unperturbed."""

import pytest
import torch

from qzo_diffusion.core.noise import Direction, directions_of_step
from qzo_diffusion.core.parametrize import parametrize
from qzo_diffusion.core.spsa import estimate_per_example
from tests.quantized import inputs, scaled_network, squared_output

LEVELS = [("dense", "relative"), ("dense", "absolute"), ("row", "relative"), ("layer", "relative")]


@pytest.mark.parametrize(("level", "units"), LEVELS)
def test_only_the_chosen_layers_are_shown_changed_and_moved(level, units):
    _, scales = scaled_network()
    numbers = parametrize(scales, level, units, trained=["2"])
    before = {name: scales[name].clone() for name in scales}
    view = numbers.view(Direction(0, 0), 0.05)
    assert view("0", scales["0"]) is scales["0"]
    assert not torch.equal(view("2", scales["2"]), scales["2"])
    numbers.move_([Direction(0, 0)], [0.05])
    numbers.merge_()
    assert torch.equal(scales["0"], before["0"])
    assert not torch.equal(scales["2"], before["2"])
    assert list(numbers.state()) == list(numbers.numbers()) == ["2"]


def test_examples_are_probed_in_the_chosen_layers_only():
    model, scales = scaled_network("bnb")
    numbers = parametrize(scales, "row", trained=["2"])
    assert numbers.gain([Direction(0, 0)], 0.01)("0") is None
    found = estimate_per_example(squared_output(model), [inputs()], numbers, directions_of_step(0, 0, 6, "rademacher"), eps=1e-2)
    assert all(found.directional_derivative)
