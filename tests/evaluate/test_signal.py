"""Diagnostics of the estimate, on losses whose gradient and noise are known."""

import math

import numpy as np
import pytest
import torch

from qzo_diffusion.core.parametrize import parametrize
from qzo_diffusion.core.probing import Probing, StepBatch
from qzo_diffusion.evaluate import signal
from qzo_diffusion.quant.load import find_scales, handles_of, quantize_


@pytest.fixture
def layer():
    """A 4-bit linear of 64 x 64, seeded."""
    linear = torch.nn.Linear(64, 64, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) / 8)
    model = torch.nn.Sequential(linear)
    quantize_(model, backend="reference")
    return model


def batch(seed, count=8):
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(seed))


def test_slopes_of_known_signal_and_noise_are_told_apart():
    """Slopes s + n with var s = 1 and var n = 1/4: agreement 0.8, signal to noise 4.

    With 4,000 directions errors are below 5 %.
    """
    generator = np.random.default_rng(0)
    signals = generator.normal(0, 1, 4000)
    first, second = (signals + generator.normal(0, 0.5, 4000) for _ in range(2))
    found = signal.agreement(first, second)
    assert found["agreement"] == pytest.approx(0.8, abs=0.03)
    assert found["signal_to_noise"] == pytest.approx(4, rel=0.1)
    assert found["agreement_ci95"][0] < 0.8 < found["agreement_ci95"][1]
    assert signal.sentence(found).startswith("The estimate carries signal")


def test_noise_alone_is_no_signal():
    generator = np.random.default_rng(1)
    found = signal.agreement(generator.normal(0, 1, 50), generator.normal(0, 1, 50))
    assert found["agreement_ci95"][0] < 0 < found["agreement_ci95"][1]
    text = signal.sentence(found)
    assert text.startswith("The estimate does not carry signal")
    assert "raise data.batch_size" in text


def test_the_same_batch_twice_agrees_entirely(layer):
    theta = parametrize(find_scales(layer), "row")
    found = signal.two_seeds(
        lambda x: layer(x).square().mean(1),
        [batch(0)],
        [batch(0)],
        theta,
        Probing(3, 1e-2),
        6,
    )
    assert found["agreement"] == 1
    assert found["signal_to_noise"] is None
    assert math.isfinite(found["slope_rms"])


def test_two_batches_of_one_loss_agree_and_of_none_do_not(layer):
    """The first loss pulls every example the same way; the second multiplies by random signs: its
    gradient is zero on average.
    """
    theta = parametrize(find_scales(layer), "row")

    def no_gradient(x):
        signs = torch.where(x > 0, 1.0, -1.0)
        return (layer(x.flip(1)) * signs).mean(1)

    kept = {"probing": Probing(3, 1e-2), "count": 16}
    same = signal.two_seeds(
        lambda x: layer(x).square().mean(1), [batch(0, 64)], [batch(1, 64)], theta, **kept
    )
    none = signal.two_seeds(no_gradient, [batch(0)], [batch(1)], theta, **kept)
    assert same["agreement_ci95"][0] > 0.5
    assert none["agreement_ci95"][0] < 0


def test_the_cosine_with_the_exact_gradient_is_what_directions_leave(layer):
    """64 rows, 64 directions: √(64 / 128) = 0.71 on average; four estimates scatter by less than
    0.1.
    """
    theta = parametrize(find_scales(layer), "row")

    def loss(x):
        return layer(x).square().mean(1)

    probing = Probing(0, 1e-3, num_directions=64)
    estimates = signal.estimates_of(loss, StepBatch([batch(0)]), theta, probing)
    found = signal.exact_cosine(
        loss, StepBatch([batch(0)]), theta, lambda: handles_of(layer), probing, estimates
    )
    assert (found["numbers"], found["derivatives"]) == (64, 64)
    assert found["expected"] == pytest.approx(math.sqrt(0.5), rel=0.01)
    assert found["cosine"] == pytest.approx(found["expected"], abs=0.15)


def test_a_step_is_as_large_as_its_rate_and_slopes_make_it(layer):
    """Along one direction each number moves by lr · |d|."""
    theta = parametrize(find_scales(layer), "row")
    first, *_ = signal.estimates_of(
        lambda x: layer(x).square().mean(1), StepBatch([batch(0)]), theta, Probing(0, 1e-3)
    )
    (row,) = signal.step_sizes(theta, first, lr=0.5)
    assert row == {
        "group": "row",
        "rms": pytest.approx(0.5 * abs(first.projected_grad[0]), rel=1e-6),
    }


def test_how_far_groups_of_layers_moved():
    base = {f"blocks.{i}.attn.to_q": torch.ones(4) for i in range(2)} | {
        "blocks.0.ff.net.0.proj": torch.ones(2),
        "out": torch.zeros(3),
    }
    tuned = {name: tensor * math.exp(0.1) for name, tensor in base.items()}
    tuned["blocks.0.ff.net.0.proj"] = torch.tensor([math.exp(-0.5), 1.0])
    rows = signal.moved(base, tuned)
    # nothing can be said of zeros
    assert [row["group"] for row in rows] == ["ff.net.0.proj", "attn.to_q"]
    assert rows[0]["max"] == pytest.approx(0.5)
    assert rows[1] == {
        "group": "attn.to_q",
        "layers": 2,
        "scales": 8,
        "rms": pytest.approx(0.1),
        "max": pytest.approx(0.1),
    }


def test_what_the_log_of_steps_tells():
    lines = [
        {
            "step": 0,
            "lr": 0.1,
            "projected_grad": [3.0, 4.0],
            "clipped": 0.5,
            "skipped": False,
            "loss": 1.0,
        },
        {
            "step": 1,
            "lr": 0.1,
            "projected_grad": 2.0,
            "clipped": True,
            "skipped": False,
            "loss": 1.0,
        },
        {
            "step": 2,
            "lr": 0.1,
            "projected_grad": "nan",
            "clipped": False,
            "skipped": True,
            "loss": "nan",
        },
        {"step": 2, "validation_loss": 1.0},
    ]
    found = signal.of_metrics(lines)
    assert found["steps"] == 3
    assert found["clipped"] == pytest.approx(0.5)
    assert found["skipped"] == pytest.approx(1 / 3)
    assert signal.of_metrics([])["clipped"] is None
