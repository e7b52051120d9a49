"""Noising and targets of diffusion, against diffusers' own schedulers and by their definition."""

import pytest
import torch

from qzo_diffusion.core.errors import ConfigError, ModelError
from qzo_diffusion.diffusion.flow_matching import Batch, denoising_loss
from qzo_diffusion.diffusion.objectives import FLOW, Ddpm, ddpm_of, with_min_snr

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SIGMA = torch.tensor([0.0, 0.2505, 0.5, 0.9999, 1.0])
STEPS = [0, 250, 500, 999, 999]


def scheduler(prediction="epsilon", **settings):
    from diffusers import DDPMScheduler

    return DDPMScheduler(**SCHEDULE, prediction_type=prediction, **settings)


def numbers(count=5):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(count, 4, 4, 4, generator=generator) for _ in range(2)]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("zero", [False, True])
def test_noising_and_targets_are_those_of_the_scheduler(prediction, zero):
    own = scheduler(prediction, rescale_betas_zero_snr=zero)
    objective, (latents, noise) = ddpm_of(own), numbers()
    steps = objective.time(SIGMA)
    assert steps.tolist() == STEPS
    noisy = objective.noisy(latents, noise, SIGMA)
    torch.testing.assert_close(noisy, own.add_noise(latents, noise, steps))
    wanted = noise if prediction == "epsilon" else own.get_velocity(latents, noise, steps)
    torch.testing.assert_close(objective.target(latents, noise, SIGMA), wanted)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_batch_can_have_another_target_at_the_same_inputs(prediction):
    objective, (latents, noise) = ddpm_of(scheduler(prediction)), numbers()
    nothing = torch.zeros(5, 0)
    batch = Batch(latents, noise, SIGMA, nothing, nothing, objective=objective)
    wanted = numbers()[0].flip(0)
    other = batch.towards(wanted)
    # a step of almost pure noise divides by √ᾱ = 0.07
    torch.testing.assert_close(other.noisy, batch.noisy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other.target, wanted, rtol=1e-5, atol=1e-5)
    for part in (other.part(slice(1, 3)), other.repeated(2), *other.split(2)):
        assert part.objective is objective


def test_min_snr_weights_follow_their_definition():
    for prediction in ("epsilon", "v_prediction"):
        objective = ddpm_of(scheduler(prediction))
        assert objective.weight(SIGMA) is None
        weighted = with_min_snr(objective, 5.0)
        product = objective.products[torch.tensor(STEPS)]
        snr = product / (1 - product)
        wanted = snr.clamp(max=5) / (snr if prediction == "epsilon" else snr + 1)
        torch.testing.assert_close(weighted.weight(SIGMA), wanted.float())
        latents, noise = numbers()
        nothing = torch.zeros(5, 0)
        plain = Batch(latents, noise, SIGMA, nothing, nothing, objective=objective)
        batch = Batch(latents, noise, SIGMA, nothing, nothing, objective=weighted)
        answer = torch.zeros_like(latents)
        torch.testing.assert_close(
            denoising_loss(answer, batch), denoising_loss(answer, plain) * wanted.float()
        )


def test_levels_of_flow_have_no_such_weights():
    assert with_min_snr(FLOW, None) is FLOW
    with pytest.raises(ConfigError, match="rectified flow"):
        with_min_snr(FLOW, 5.0)


def test_a_prediction_that_is_not_known_is_refused():
    with pytest.raises(ModelError, match="prediction_type = 'sample'"):
        ddpm_of(scheduler("sample"))


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "PNDMScheduler", "DDIMScheduler"])
def test_the_schedule_is_read_from_any_scheduler(name):
    import diffusers

    own = getattr(diffusers, name)(**SCHEDULE, prediction_type="v_prediction")
    objective = ddpm_of(own)
    assert isinstance(objective, Ddpm)
    assert objective.predicts_v
    torch.testing.assert_close(objective.products.float(), own.alphas_cumprod)
