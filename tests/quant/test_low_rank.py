"""Low-rank factors of a change against the whole singular value decomposition."""

import pytest
import torch

from qzo_diffusion.quant.factors import low_rank
from qzo_diffusion.quant.low_rank import low_rank_changes, norm_kept
from tests.quantized import assert_same, scaled_network, snapshot


def matrix(rows, columns, decay=0.0, seed=0):
    """Singular values fall like n^-decay; 0 is a flat spectrum, the hardest."""
    generator = torch.Generator().manual_seed(seed)
    small = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, small, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, small, generator=generator)).Q
    return left * torch.arange(1, small + 1).float().pow(-decay) @ right.T


@pytest.mark.parametrize("shape", [(48, 64), (64, 48)])
def test_factors_are_the_best_of_their_rank(shape):
    change = matrix(*shape, decay=0.5)
    found, values = low_rank(change, 8), torch.linalg.svdvals(change)
    product = found.up.float() @ found.down.float()
    best = values[8:].square().sum().sqrt()
    assert (change - product).norm() == pytest.approx(float(best), rel=1e-3)
    assert found.kept / found.whole == pytest.approx(
        float(values[:8].square().sum() / values.square().sum()), rel=1e-4
    )


@pytest.mark.parametrize(("decay", "share"), [(1.0, 0.999), (0.5, 0.995), (0.0, 0.97)])
def test_the_search_in_large_layers_finds_nearly_the_best(decay, share):
    change = matrix(640, 600, decay)
    values = torch.linalg.svdvals(change)
    found = low_rank(change, 16)
    assert found.kept >= share * float(values[:16].square().sum())
    left = (change - found.up.float() @ found.down.float()).square().sum()
    assert float(left) == pytest.approx(found.whole - found.kept, rel=1e-2)


def test_equal_changes_have_equal_factors():
    change = matrix(640, 600, 0.5)
    one, other = low_rank(change, 4), low_rank(change.clone(), 4)
    assert torch.equal(one.up, other.up)
    assert torch.equal(one.down, other.down)


def test_a_rank_above_the_layers_own_is_filled_with_zeros():
    change = matrix(6, 9)
    found = low_rank(change, 8)
    assert found.up.shape == (6, 8)
    assert found.down.shape == (8, 9)
    assert torch.allclose(found.up.float() @ found.down.float(), change, atol=1e-3)


def test_layers_of_a_model_keep_their_scales_and_untouched_ones_are_left_out():
    model, scales = scaled_network("bnb")
    before, (first, *_) = snapshot(model, scales), scales
    generator = torch.Generator().manual_seed(1)
    tuned = {name: scales[name].clone() for name in scales}
    tuned[first] *= 1 + 0.1 * torch.rand(tuned[first].shape, generator=generator)
    layers = low_rank_changes(model, scales, tuned, rank=10**6)
    assert list(layers) == [first]
    assert_same(before, snapshot(model, scales))
    assert norm_kept(layers) == pytest.approx(1)
    few = low_rank_changes(model, scales, tuned, rank=1)
    assert 0 < norm_kept(few) < 1
