"""Some layers trained, the others untouched and unperturbed."""

import pytest
import torch

from qzo_diffusion.core.noise import Direction, directions_of_step
from qzo_diffusion.core.parametrize import parametrize
from tests.quantized import estimated, inputs, scaled_network, squared_output

LEVELS = [
    ("dense", "absolute"),
    *((level, "relative") for level in ("dense", "row", "layer", "column", "separable")),
]


@pytest.mark.parametrize(("level", "units"), LEVELS)
def test_only_the_chosen_layers_are_shown_changed_and_moved(level, units):
    _, scales = scaled_network()
    theta = parametrize(scales, level, units, trained=["2"])
    before = {name: scales[name].clone() for name in scales}
    view = theta.perturbed(Direction(0, 0), 0.05)
    shown = view(["0", "2"])
    assert list(shown) == ["2"]
    assert not torch.equal(shown["2"], scales["2"])
    assert view(["0"]) == {}
    theta.move_([Direction(0, 0)], [0.05])
    theta.merge_()
    assert torch.equal(scales["0"], before["0"])
    assert not torch.equal(scales["2"], before["2"])
    expected = {"dense": scales["2"].numel(), "row": 8, "layer": 1, "column": 2, "separable": 10}[
        level
    ]
    assert sum(tensor.numel() for tensor in theta.templates().values()) == expected


def test_examples_are_probed_in_the_chosen_layers_only():
    model, scales = scaled_network("bnb")
    theta = parametrize(scales, "row", trained=["2"])
    _, scaling = theta.probes([Direction(0, 0)], [0.01, -0.01])
    assert list(scaling(["0", "2"])) == ["2"]
    found = estimated(
        squared_output(model),
        [inputs()],
        theta,
        directions_of_step(0, 0, 6, "rademacher"),
        eps=1e-2,
        per_example=True,
    )
    assert all(found.directional_derivative)
