"""The cosine that directions allow, against the mean over many estimates of a small model whose
tokens meet."""

import math

import pytest
import torch

from qzo_diffusion.core.expected_cosine import expected_cosine, length_correction
from qzo_diffusion.core.oracle import alignment, exact_gradient, patch_group_gradients
from qzo_diffusion.core.parametrize import parametrize
from qzo_diffusion.core.probing import Probing, StepBatch
from qzo_diffusion.core.spsa import mean_loss, probe
from qzo_diffusion.quant.load import handles_of
from tests.core.seeds import averaged_over
from tests.quantized import inputs, scaled_network

EXAMPLES, TOKENS, GROUPS, WIDTH = 3, 8, 4, 64
TARGETS = inputs(EXAMPLES * TOKENS, WIDTH, torch.float64, seed=5).view(EXAMPLES, TOKENS, WIDTH)


def pictures():
    """Examples of different sizes, with their own targets beside them, [B, 2, T, W]."""
    x = inputs(EXAMPLES * TOKENS, WIDTH, torch.float64).view(EXAMPLES, TOKENS, WIDTH)
    sizes = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64).view(-1, 1, 1)
    return torch.stack([x * sizes, TARGETS * sizes], 1)


def mixed(model, groups):
    """An objective with a part of every token in all others, as attention has: [B, P] losses."""

    def loss(batch):
        hidden = torch.tanh(model[0](batch[:, 0]))
        out = model[2](hidden + hidden.mean(1, keepdim=True))
        return (out - batch[:, 1]).square().mean(-1).view(len(batch), groups, -1).mean(-1)

    return loss


def small(level="separable", token_wise=("0",)):
    model, scales = scaled_network(dtype=torch.float64, width=WIDTH, out=WIDTH, blocksize=32)
    return model, scales, parametrize(scales, level, token_wise=token_wise)


CASES = {
    "one shared direction": ("dense", 1, {"estimator": "antithetic"}),
    "shared directions": ("separable", 1, {"num_directions": 12}),
    "shared gaussian directions": (
        "row",
        1,
        {"num_directions": 6, "distribution": "gaussian", "estimator": "antithetic"},
    ),
    "a direction of each example": ("row", 1, {"per_example": True, "estimator": "antithetic"}),
    "directions of each example": ("separable", 1, {"per_example": True, "num_directions": 8}),
    "gaussian directions of each example": (
        "row",
        1,
        {"per_example": True, "num_directions": 8, "distribution": "gaussian"},
    ),
    "a direction of each patch group": (
        "separable",
        GROUPS,
        {"per_example": True, "estimator": "antithetic"},
    ),
    "directions of each patch group": (
        "separable",
        GROUPS,
        {"per_example": True, "num_directions": 8},
    ),
    "normalised": (
        "separable",
        GROUPS,
        {"per_example": True, "num_directions": 8, "normalize": True},
    ),
}


@averaged_over(50, 150)
@pytest.mark.parametrize("token_wise", [("0",), ("0", "2")])
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_mean_over_many_estimates(name, token_wise, seeds):
    level, groups, settings = CASES[name]
    model, _, theta = small(level, token_wise)
    batch = StepBatch(list(pictures().split(2)), patch_groups=groups)
    probing = Probing(3, 1e-4, **{"estimator": "leave_one_out"} | settings)
    objective = mixed(model, groups)
    exact = exact_gradient(objective, batch.micro_batches, theta, handles_of(model))
    seeds *= 4 if probing.num_directions == 1 else 1
    cosines = torch.tensor(
        [
            alignment(theta, probe(objective, batch, theta, probing, step), exact).cosine
            for step in range(seeds)
        ]
    )
    error = cosines.std().item() / seeds**0.5
    expected = expected_cosine(objective, batch, theta, lambda: handles_of(model), probing)
    assert cosines.mean().item() == pytest.approx(expected, abs=0.03 * expected + 3 * error)


def test_patch_groups_help_less_than_so_many_independent_directions_would():
    model, _, theta = small()
    numbers = sum(one.numel() for one in theta.templates().values())
    probing = Probing(0, 1e-4, num_directions=8, per_example=True, estimator="leave_one_out")
    found = {
        groups: expected_cosine(
            mixed(model, groups),
            StepBatch([pictures()], patch_groups=groups),
            theta,
            lambda: handles_of(model),
            probing,
        )
        for groups in (1, GROUPS)
    }
    independent = 7 * EXAMPLES * GROUPS
    assert found[1] < found[GROUPS] < math.sqrt(independent / (independent + numbers))


@pytest.mark.parametrize("level", ["row", "column", "layer", "separable"])
def test_gradients_of_patch_groups_sum_to_the_gradient(level):
    model, _, theta = small(level)
    theta.move_(probe_directions(theta, model), [0.05])
    handles = handles_of(model)
    parts = list(patch_group_gradients(mixed(model, GROUPS), pictures(), theta, handles, GROUPS))
    exact = exact_gradient(mixed(model, 1), [pictures()], theta, handles_of(model))
    for key, one in exact.items():
        whole = sum(part[key].sum((0, 1)) for part in parts) / (GROUPS * EXAMPLES)
        torch.testing.assert_close(whole, one)
        assert parts[0][key].shape == (
            EXAMPLES,
            GROUPS if theta.is_token_wise(key) else 1,
            one.numel(),
        )


def probe_directions(theta, model):
    found = probe(mixed(model, 1), StepBatch([pictures()]), theta, Probing(1, 1e-3), 0)
    return found.directions


def test_other_patch_groups_are_seen_through_what_tokens_share():
    model, _, theta = small("row", ("0", "2"))
    (first, *_) = patch_group_gradients(
        mixed(model, GROUPS), pictures(), theta, handles_of(model), GROUPS
    )
    own, other = first["row.pointwise"][:, 0], first["row.pointwise"][:, 1]
    before, after = theta.place("row.pointwise", "0"), theta.place("row.pointwise", "2")
    assert other[:, before].abs().max() > 0.01 * own[:, before].abs().max()
    assert other[:, after].abs().max() == 0  # tokens do not meet behind it


def test_losses_of_another_number_are_refused():
    model, _, theta = small()
    with pytest.raises(ValueError, match="3 losses for 3 examples of 4 groups"):
        next(patch_group_gradients(mixed(model, 1), pictures(), theta, handles_of(model), 4))


def test_the_model_is_what_it_was():
    model, _, theta = small()
    loss = mean_loss(mixed(model, 1), [pictures()])
    list(patch_group_gradients(mixed(model, GROUPS), pictures(), theta, handles_of(model), GROUPS))
    assert mean_loss(mixed(model, 1), [pictures()]) == loss


def test_few_directions_are_corrected_for_their_length():
    assert length_correction(1) == pytest.approx(math.sqrt(2 / math.pi))
    assert length_correction(1000) == pytest.approx(1, abs=1e-3)
