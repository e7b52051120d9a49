"""Maps that are learned on a text: what they are learned for gets better."""

import pytest
import torch

from qzo_diffusion.core.errors import DataError
from qzo_diffusion.llm import calibration
from qzo_diffusion.llm.flatquant import Rounding, fitted, relative_error, rounded
from qzo_diffusion.llm.kurtail import cayley, kurtosis, least_kurtosis
from qzo_diffusion.quant.hadamard import hadamard_map
from tests.tiny_llama import tiny_llama


def peaked(rows, columns):
    """Numbers with heavy tails, and three columns that are large."""
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(rows, columns, generator=generator).pow(3)
    found[:, :3] *= 8
    return found


def test_a_learned_rotation_makes_inputs_flatter_than_a_fixed_one():
    rows, start = peaked(600, 24), hadamard_map(24).matrix()
    found = least_kurtosis(rows, start)
    assert kurtosis(rows @ start.float()) < 0.5 * kurtosis(rows)
    assert kurtosis(rows @ found.float()) < 0.95 * kurtosis(rows @ start.float())
    one = torch.eye(24, dtype=torch.float64)
    torch.testing.assert_close(found @ found.T, one, rtol=0, atol=1e-12)
    assert torch.equal(found, least_kurtosis(rows, start))


def test_kurtosis_is_three_for_normal_numbers():
    rows = torch.randn(200, 1000, generator=torch.Generator().manual_seed(0))
    assert abs(kurtosis(rows) - 3) < 0.02
    torch.testing.assert_close(kurtosis(5 * rows), kurtosis(rows))


def test_a_cayley_step_turns_by_its_angle():
    turn = torch.zeros(2, 2, dtype=torch.float64)
    turn[0, 1], turn[1, 0] = 0.1, -0.1
    found = cayley(torch.eye(2, dtype=torch.float64), turn)
    torch.testing.assert_close(found @ found.T, torch.eye(2, dtype=torch.float64))
    assert abs(found[1, 0].item() - 0.1) < 1e-3


@pytest.mark.parametrize("inputs", [0, 12, None])
def test_a_fitted_map_has_a_smaller_error_than_the_one_it_began_as(inputs):
    rounding, rows = Rounding(12, inputs), peaked(256, 24)
    weight = torch.randn(40, 24, generator=torch.Generator().manual_seed(1))
    weight[:, 5] *= 10
    began, ended = (
        relative_error(one, rows.double(), weight.double(), rounding).item()
        for one in (hadamard_map(24), fitted(rows, weight, rounding))
    )
    assert ended < 0.8 * began


def test_rounding_passes_derivatives_as_they_are():
    x = torch.tensor([[0.2, -1.0, 3.4, 7.0]], requires_grad=True)
    found = rounded(x, 4)
    assert found.tolist() == [[0.0, -1.0, 3.0, 7.0]]
    slope = torch.autograd.grad(found[0, :3].sum(), x)[0]
    assert slope[0, :3].tolist() == [1.0, 1.0, 1.0]


def test_inputs_are_those_of_the_same_tokens(monkeypatch):
    monkeypatch.setattr(calibration, "KEPT", 5)
    lm = tiny_llama()
    layers = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]
    windows = torch.arange(24).view(3, 8)
    query, key = calibration.layer_inputs(lm.model, windows, layers).values()
    assert query.shape == (5, 64)
    assert torch.equal(query, key)
    hidden = lm.model.model.layers[0].input_layernorm(lm.model.model.embed_tokens(windows))
    places = [(hidden.view(24, -1) == row).all(1).nonzero().item() for row in query]
    assert places == sorted(places)
    assert not lm.model.get_submodule(layers[0])._forward_pre_hooks


def test_a_short_text_is_refused(tmp_path):
    with pytest.raises(DataError, match="of 7 tokens"):
        calibration.windows_of(list(range(7)))
    with pytest.raises(DataError, match=r"correct quant\.calibration"):
        calibration.read_text(tmp_path / "no.txt")
