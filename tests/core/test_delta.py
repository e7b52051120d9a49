"""A delta gives the tuned scales back bit for bit, whatever was trained, and is small where groups
were.
"""

import pytest
import torch

from qzo_diffusion.core.delta import expanded, shrunk
from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.core.parametrization import tuned_scales
from qzo_diffusion.core.parametrize import parametrize
from tests.quantized import scaled_network

LEVELS = ["layer", "row", "column", "separable", "dense"]


def tuned_by(level, seed=0, quant_type="nf4"):
    _, scales = scaled_network("reference", quant_type, width=512, out=64)
    theta, generator = parametrize(scales, level), torch.Generator().manual_seed(seed)
    for name, number in theta.templates().items():
        theta.add_(name, torch.randn(number.shape, generator=generator) * 0.05)
    return {name: one.clone() for name, one in tuned_scales(theta).items()}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("seed", range(3))
def test_the_tuned_scales_come_back_bit_for_bit(level, seed):
    tuned = tuned_by(level, seed)
    _, scales = scaled_network("reference", width=512, out=64)
    back = expanded(scales, shrunk(scales, tuned))
    assert back.keys() == tuned.keys()
    assert all(torch.equal(back[name], tuned[name]) for name in tuned)


def test_negative_scales_come_back_and_take_as_little_room():
    """Scales of both signs, as BOF4-S has them."""
    tuned = tuned_by("separable", quant_type="bof4s")
    _, scales = scaled_network("reference", "bof4s", width=512, out=64)
    stored = shrunk(scales, tuned)
    back = expanded(scales, stored)
    assert all((tuned[name] < 0).any() and torch.equal(back[name], tuned[name]) for name in tuned)
    assert sum(tensor.nbytes for tensor in stored.values()) <= 8000


@pytest.mark.parametrize(
    ("level", "at_most"),
    [("layer", 2 * 4), ("column", 2 * 8 * 4), ("row", 576 * 4), ("separable", 8000)],
)
def test_groups_take_a_factor_each(level, at_most):
    """Two layers of 512 and 64 rows and 8 block columns; a factor is 4 bytes, and separable scales
    take a byte a scale more.
    """
    _, scales = scaled_network("reference", width=512, out=64)
    assert sum(tensor.nbytes for tensor in shrunk(scales, tuned_by(level)).values()) <= at_most


def test_layers_that_did_not_change_are_left_out():
    _, scales = scaled_network("reference", width=512, out=64)
    tuned = {name: one.clone() for name, one in scales.tensors().items()}
    assert shrunk(scales, tuned) == {}
    tuned["2"][0] = 0.0  # floored at zero, beside a block of zeros
    scales["2"][1] = tuned["2"][1] = 0.0
    stored = shrunk(scales, tuned)
    assert {name.rpartition(":")[0] for name in stored} == {"2"}
    assert torch.equal(expanded(scales, stored)["2"], tuned["2"])


def test_changes_of_another_model_are_refused():
    _, scales = scaled_network("reference", width=512, out=64)
    stored = shrunk(scales, tuned_by("row"))
    _, narrow = scaled_network("reference", width=256, out=64)
    with pytest.raises(ModelError, match="do not fit this model"):
        expanded(narrow, stored)
    with pytest.raises(ModelError, match="do not fit this model"):
        expanded(scales, {"9:row": torch.ones(1, 1)})
