"""Products that gradients pass: what they keep, and what checkpointing leaves equal."""

import pytest
import torch
from torch import nn

from qzo_diffusion.core.exact_product import blocks_of
from qzo_diffusion.core.oracle import exact_gradient
from qzo_diffusion.core.parametrize import parametrize
from qzo_diffusion.quant.load import find_scales, handles_of, quantize_
from tests.quantized import assert_same, scaled_network, snapshot, squared_output
from tests.quantized import inputs as drawn
from tests.small_models import causal_lm, sd3_inputs, sd3_transformer

SKIP = ("pos_embed", "time_text_embed", "context_embedder", "norm_out", "proj_out")
LEVELS = ["dense", "row", "separable"]


def sd3(dtype=torch.float32):
    model = sd3_transformer("medium")
    quantize_(model.to(dtype), skip=SKIP)
    inputs = {
        name: tensor.to(dtype) if name != "timestep" else tensor
        for name, tensor in sd3_inputs(model).items()
    }

    def loss(batch):
        chosen = {name: tensor[batch] for name, tensor in inputs.items()}
        return model(**chosen).sample.float().square().flatten(1).mean(1)

    return model, find_scales(model), loss


def norm(gradient):
    return torch.cat([one.flatten() for one in gradient.values()])


@pytest.mark.parametrize("level", LEVELS)
def test_blocks_that_are_computed_again_have_the_same_gradient(level):
    model, scales, loss = sd3()
    theta = parametrize(scales, level)
    blocks = blocks_of(model)
    assert blocks == list(model.transformer_blocks)
    before = snapshot(model, scales)
    plain, again = (
        exact_gradient(loss, [[0], [1]], theta, handles_of(model), of) for of in ((), blocks)
    )
    assert plain.keys() == again.keys() == theta.templates().keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert norm(plain).norm() > 0
    assert_same(before, snapshot(model, scales))
    assert not any("forward" in vars(module) for module in model.modules())


def test_the_gradient_in_bfloat16_points_where_that_in_fp32_does():
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model, scales, loss = sd3(dtype)
        theta = parametrize(scales, "separable")
        found.append(
            norm(exact_gradient(loss, [[0, 1]], theta, handles_of(model), blocks_of(model)))
        )
    exact, rounded = found
    # each product is good to 2^-8, and codes near a boundary differ
    assert torch.cosine_similarity(exact, rounded, dim=0) > 0.98
    assert rounded.dtype == torch.float32


def test_no_weight_is_kept_for_the_way_back():
    model, scales = scaled_network("bnb")
    theta, kept = parametrize(scales, "separable"), []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        exact_gradient(squared_output(model), [drawn(2)], theta, handles_of(model))
    assert kept
    assert max(kept) < 128 * 128 / 2  # a weight has 128 x 128


def test_blocks_keep_their_inputs_alone():
    model, scales, loss = sd3()
    theta, totals = parametrize(scales, "row"), []
    for of in ((), blocks_of(model)):
        kept = []

        def pack(tensor, kept=kept):
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            exact_gradient(loss, [[0, 1]], theta, handles_of(model), of)
        totals.append(sum(kept))
    assert totals[1] < totals[0] / 3


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_on_the_way_back_leaves_the_model(error):
    model, scales, loss = sd3()
    theta, before = parametrize(scales, "separable"), snapshot(model, scales)
    theta.by_axis["row"].add_(0.1)

    def failing(batch):
        found = loss(batch)

        def fail(_slope):
            raise error

        found.register_hook(fail)
        return found

    with pytest.raises(error):
        exact_gradient(failing, [[0]], theta, handles_of(model), blocks_of(model))
    assert_same(before, snapshot(model, scales))
    assert not any("forward" in vars(module) for module in model.modules())


def test_blocks_are_the_members_of_the_outermost_lists():
    assert blocks_of(nn.Sequential(nn.Linear(2, 2))) == []
    model = causal_lm("llama")
    assert blocks_of(model) == list(model.model.layers)
