"""Each rival by the property that defines it, and a run of each on a small model."""

import pytest
import torch
from torch import nn

from benchmarks.llm_compare.methods import Places
from benchmarks.rivals import grass, lsq, run, wta_crs
from benchmarks.rivals.methods import METHODS
from tests.tiny_llama import save_tiny_llama, write_sentences


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear(rows=6, columns=128):
    layer = nn.Linear(columns, rows, bias=False)
    layer.weight.data = random(rows, columns, seed=1)
    return layer


def test_lsqs_weights_are_codes_times_steps_and_slopes_are_its_equation_3():
    master, slope = random(3, 128), random(3, 128, seed=2)
    steps = torch.tensor([[0.1, 0.5], [0.2, 0.3], [1.0, 0.05]])
    master.requires_grad_()
    steps.requires_grad_()
    made = lsq.Quantize.apply(master, steps)
    wide = steps.detach().repeat_interleave(64, 1)
    ratio = master.detach() / wide
    codes = ratio.clamp(-8, 7).round()
    assert torch.equal(made.detach(), codes * wide)
    made.backward(slope)
    inside = (ratio >= -8) & (ratio <= 7)
    assert 0 < inside.sum() < inside.numel()
    assert torch.equal(master.grad, slope * inside)
    each = slope * torch.where(inside, ratio.round() - ratio, ratio.sign().clamp(0) * 15 - 8)
    expected = each.view(3, 2, 64).sum(-1) / (64 * 7) ** 0.5
    assert torch.allclose(steps.grad, expected, rtol=1e-5, atol=1e-5)


def test_lsqs_codes_are_rounded_again_where_the_master_or_a_step_moves():
    layer = lsq.LsqLinear(linear())
    eye = torch.eye(128)
    before = layer(eye).T / layer.steps.repeat_interleave(64, 1)
    with torch.no_grad():
        layer.weight[0] += 1.01 * layer.steps[0].repeat_interleave(64)
        layer.steps[1] *= 2
    codes = layer(eye).T / layer.steps.repeat_interleave(64, 1)
    moved = (codes - before)[0][before[0] < 6]
    assert (moved.round() >= 1).all()
    assert not torch.equal(codes[1].round(), before[1].round())
    assert torch.equal(codes[2:].round(), before[2:].round())


def test_grasss_projection_is_exact_on_its_rows():
    gradient = random(9, 5)
    rows = grass.strongest_rows(gradient, 3)
    norms = gradient.norm(dim=1)
    assert norms[rows].min() > norms[[row for row in range(9) if row not in rows]].max()
    back = grass.project_back(grass.project(gradient, rows), rows, gradient)
    assert torch.equal(back[rows], gradient[rows])
    assert back.count_nonzero() == 3 * 5
    again = grass.project(back, rows)  # Pᵀ P is the identity
    assert torch.equal(again, gradient[rows])


def test_grass_computes_the_rows_of_the_exact_gradient_and_changes_no_others(monkeypatch):
    monkeypatch.setattr(grass, "ROWS", 2)
    monkeypatch.setattr(grass, "REFRESH", 2)
    layer, chosen = grass.GrassLinear(linear()), []
    for step in range(3):
        x, before = random(4, 7, 128, seed=step).requires_grad_(), layer.weight.clone()
        weight = before.clone().requires_grad_()
        expected = torch.autograd.grad((x @ weight.T).square().sum(), [weight, x])
        layer(x).square().sum().backward()
        rows = layer._rows
        assert torch.allclose(layer._gradient, expected[0][rows], rtol=1e-4, atol=1e-3)
        assert torch.allclose(x.grad, expected[1], rtol=1e-4, atol=1e-4)
        layer.step_(0.01)
        changed = (layer.weight != before).any(1).nonzero().flatten()
        assert torch.equal(changed, rows)
        chosen.append(rows)
    assert torch.equal(chosen[0], chosen[1])
    strongest = grass.strongest_rows(expected[0], 2)
    assert torch.equal(chosen[2], strongest)


def test_wta_crs_is_unbiased_within_standard_errors():
    tokens, slopes = random(20, 3), random(20, 2, seed=1)
    tokens[:3] *= 10
    exact, generator = slopes.T @ tokens, torch.Generator().manual_seed(0)
    draws = []
    for _ in range(1500):
        places, factors = wta_crs.chosen(tokens.norm(dim=1), 8, generator)
        draws.append((slopes[places] * factors.unsqueeze(1)).T @ tokens[places])
    found = torch.stack(draws)
    error = found.std(0) / len(draws) ** 0.5
    assert ((found.mean(0) - exact).abs() <= 4 * error).all()
    assert {0, 1, 2} <= set(places.tolist())  # the winners, which no draw leaves out


def test_wta_crs_with_the_budget_of_all_that_count_is_exact():
    """Tokens beyond the winners are next to nothing."""
    norms = torch.tensor([4.0, 2.0, 1.0, 1e-9, 1e-9])
    places, factors = wta_crs.chosen(norms, 4, torch.Generator().manual_seed(0))
    weights = torch.zeros(5).index_add(0, places, factors)
    assert weights[:3].tolist() == pytest.approx([1, 1, 1])


def test_a_layer_of_wta_crs_has_the_exact_slope_of_its_input():
    layer = wta_crs.WtaCrsLinear(linear(), torch.Generator().manual_seed(0))
    x = random(4, 9, 128).requires_grad_()
    out = layer(x)
    assert torch.equal(out.detach(), (x @ layer.weight.T).detach())
    out.square().sum().backward()
    expected = torch.autograd.grad((x @ layer.weight.T).square().sum(), [layer.weight, x])
    assert torch.allclose(x.grad, expected[1], rtol=1e-4, atol=1e-4)
    alike = torch.cosine_similarity(layer.weight.grad.flatten(), expected[0].flatten(), dim=0)
    assert 0.2 < alike < 0.99


# Runs are in bfloat16, which many processors are slow in: two methods are tried in it.
@pytest.mark.parametrize("name", METHODS)
def test_a_run_of_each_lowers_the_held_out_loss(tmp_path, monkeypatch, name):
    save_tiny_llama(tmp_path / "model")
    write_sentences(tmp_path / "data" / "sst2", train=120)
    monkeypatch.setitem(run.LR, name, 1e-2)
    if name not in ("grass", "wta_crs"):
        monkeypatch.setattr(run, "BFLOAT16", ["compute.dtype=float32"])
    places = Places(tmp_path, tmp_path, tmp_path / "data", tmp_path / "model", steps=4)
    start = run.Task(places).held_out_loss()
    found = run.train(name, places)
    assert found["validation_loss"]["end"] < start
    assert (found["steps"], found["forwards"]) == (4, 64)
    assert 0 <= found["value"] <= 1
