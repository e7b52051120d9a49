"""The rectified-flow objective: its formula, its noise levels, and that both forwards of a step see
the same.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qzo_diffusion.diffusion.families.family import model_loss
from qzo_diffusion.diffusion.families.sd3 import SD3
from qzo_diffusion.diffusion.flow_matching import (
    Batch,
    divisor_up_to,
    sample_sigmas,
    share_below,
    shift_sigma,
)


class Recorder:
    """A transformer that remembers its input and answers with a known velocity."""

    def __init__(self, answer):
        self.answer, self.calls = answer, []

    def __call__(self, **arguments):
        self.calls.append(arguments)
        return (self.answer,)


def make_batch(count=4, sigma=None):
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(count, 16, 8, 8, generator=generator) for _ in range(2))
    sigma = torch.linspace(0, 1, count) if sigma is None else sigma
    embeds, pooled = (
        torch.randn(count, 6, 32, generator=generator),
        torch.randn(count, 8, generator=generator),
    )
    return Batch(latents, noise, sigma, embeds, pooled)


def test_the_right_velocity_has_no_loss():
    batch = make_batch()
    transformer = Recorder(batch.noise - batch.latents)
    assert torch.equal(model_loss(SD3, transformer, batch, torch.float32), torch.zeros(4))


def test_the_loss_is_the_mean_squared_error_of_each_example():
    batch = make_batch()
    offset = torch.tensor([0.0, 1.0, 2.0, 3.0])
    transformer = Recorder(batch.noise - batch.latents + offset.view(-1, 1, 1, 1))
    torch.testing.assert_close(model_loss(SD3, transformer, batch, torch.float32), offset.square())


def test_input_runs_from_the_latents_to_pure_noise_and_time_from_0_to_1000():
    batch = make_batch()
    transformer = Recorder(batch.noise)
    model_loss(SD3, transformer, batch, torch.float32)
    (call,) = transformer.calls
    assert torch.equal(call["hidden_states"][0], batch.latents[0])
    assert torch.equal(call["hidden_states"][-1], batch.noise[-1])
    torch.testing.assert_close(call["timestep"], 1000 * batch.sigma)
    middle = make_batch(sigma=torch.full((4,), 0.25))
    model_loss(SD3, transformer, middle, torch.float32)
    torch.testing.assert_close(
        transformer.calls[-1]["hidden_states"], 0.75 * middle.latents + 0.25 * middle.noise
    )


def test_losses_are_fp32_when_the_model_computes_in_bf16():
    batch = make_batch()
    transformer = Recorder(batch.noise.bfloat16())
    assert model_loss(SD3, transformer, batch, torch.bfloat16).dtype == torch.float32
    assert transformer.calls[0]["hidden_states"].dtype == torch.bfloat16


def test_micro_batches_hold_every_example_once():
    batch = make_batch(7)
    parts = batch.split(3)
    assert [len(part.sigma) for part in parts] == [3, 3, 1]
    assert torch.equal(torch.cat([part.latents for part in parts]), batch.latents)
    assert torch.equal(torch.cat([part.sigma for part in parts]), batch.sigma)


@pytest.mark.parametrize("distribution", ["uniform", "logit_normal"])
@pytest.mark.parametrize("count", [1, 2, 16])
def test_noise_levels_have_one_in_each_stratum(distribution, count):
    for seed in range(50):
        sigma = sample_sigmas(count, torch.Generator().manual_seed(seed), distribution=distribution)
        quantile = (
            sigma.double()
            if distribution == "uniform"
            else torch.special.ndtr(torch.logit(sigma.double()))
        )
        assert (quantile * count).floor().clamp(0, count - 1).sort().values.tolist() == list(
            range(count)
        )


def test_stratified_levels_have_the_mean_of_the_distribution():
    draws = torch.cat(
        [sample_sigmas(4, torch.Generator().manual_seed(seed)) for seed in range(2000)]
    ).double()
    assert abs(draws.mean().item() - 0.5) < 5 * (1 / 12) ** 0.5 / 8000**0.5


def test_logit_normal_has_median_one_half_at_shift_1_and_three_quarters_at_shift_3():
    for shift, median in ((1.0, 0.5), (3.0, 0.75)):
        sigma = sample_sigmas(
            10_000, torch.Generator().manual_seed(0), distribution="logit_normal", shift=shift
        )
        assert sigma.median().item() == pytest.approx(median, abs=1e-3)


def test_shift_keeps_the_ends_and_1_is_the_identity():
    sigma = torch.linspace(0, 1, 11)
    assert torch.equal(shift_sigma(sigma, 1.0), sigma)
    shifted = shift_sigma(sigma, 3.0)
    assert shifted[0] == 0
    assert shifted[-1] == 1
    assert (shifted[1:-1] > sigma[1:-1]).all()


@pytest.mark.parametrize(("distribution", "shift"), [("uniform", 1), ("logit_normal", 3)])
def test_a_narrower_range_has_one_level_in_each_stratum_of_the_part_inside(distribution, shift):
    low, high, count = 0.6, 0.95, 8
    first, last = (share_below(level, distribution, shift) for level in (low, high))
    for seed in range(50):
        sigma = sample_sigmas(
            count,
            torch.Generator().manual_seed(seed),
            distribution=distribution,
            shift=shift,
            low=low,
            high=high,
        ).double()
        assert (sigma > low).all()
        assert (sigma < high).all()
        shares = [share_below(float(level), distribution, shift) for level in sigma]
        places = sorted(int((share - first) / (last - first) * count) for share in shares)
        assert places == list(range(count))


def test_the_share_of_lower_levels_is_the_one_that_is_drawn():
    count = 10_000
    for distribution, shift in (("uniform", 3.0), ("logit_normal", 0.5)):
        sigma = sample_sigmas(
            count, torch.Generator().manual_seed(0), distribution=distribution, shift=shift
        )
        for level in (0.0, 0.1, 0.7, 1.0):
            drawn = int((sigma.double() < level).sum())
            # a level in each of 10,000 strata: the count can differ by that of one stratum
            assert abs(drawn - count * share_below(level, distribution, shift)) <= 1


@pytest.mark.usefixtures("global_rng_untouched")
def test_levels_follow_the_generator_alone():
    draws = [sample_sigmas(8, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*draws)


def test_losses_of_regions_average_to_the_examples_and_see_their_own_patches_only():
    batch = make_batch()
    wrong = batch.noise - batch.latents
    wrong[:, :, 2:4, 4:6] += 3.0  # the patch in row 1, column 2: the seventh of sixteen
    whole = model_loss(SD3, Recorder(wrong), batch, torch.float32)
    for patch_groups in (1, 2, 4, 16):
        of_regions = model_loss(
            SD3, Recorder(wrong), replace(batch, patch_groups=patch_groups), torch.float32
        ).view(4, -1)
        torch.testing.assert_close(of_regions.mean(1), whole)
        assert of_regions[0].nonzero().flatten().tolist() == [6 * patch_groups // 16]


def test_a_batch_keeps_its_regions_whatever_is_done_to_it():
    batch = replace(make_batch(), patch_groups=4)
    parts = [
        batch.part(slice(1, 3)),
        batch.repeated(2),
        batch.to(torch.device("cpu")),
        *batch.split(2),
    ]
    assert {part.patch_groups for part in parts} == {4}


@given(st.integers(1, 64), st.integers(1, 5000))
def test_regions_are_as_many_as_fit(wanted, tokens):
    found = divisor_up_to(wanted, tokens)
    assert tokens % found == 0
    assert found <= wanted
    assert all(tokens % count for count in range(found + 1, min(wanted, tokens) + 1))
