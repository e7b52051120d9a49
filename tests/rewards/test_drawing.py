"""Pictures of a step: those of diffusers' pipeline, each under its own probe."""

import pytest
import torch

from qzo_diffusion.core.noise import directions_of_step
from qzo_diffusion.core.parametrize import parametrize
from qzo_diffusion.core.probing import Probing, StepBatch
from qzo_diffusion.core.spsa import probe
from qzo_diffusion.diffusion.encoded_prompt import EncodedPrompt
from qzo_diffusion.diffusion.families.sd3 import SD3
from qzo_diffusion.diffusion.model_folder import load_scheduler
from qzo_diffusion.diffusion.sampling import Sampler
from qzo_diffusion.diffusion.vae import load_vae
from qzo_diffusion.quant.load import find_scales
from qzo_diffusion.rewards.drawing import Drawer
from qzo_diffusion.rewards.objective import RewardObjective, Shown, Told
from qzo_diffusion.rewards.pictures import PictureBatch

CPU, SIDE, STEPS, SEED = torch.device("cpu"), 64, 3, 5
GUIDANCE = [0.0, 3.0]
PROBING = {"per_example": True, "within_example": True}


def encoded(seed):
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(28, 64, generator=generator)
    return EncodedPrompt(embeds, torch.randn(64, generator=generator), 5, False)


@pytest.fixture(scope="module")
def parts(pipeline, tmp_path_factory):
    """Transformer in 4 bits, scales, and VAE of the small model."""
    from qzo_diffusion.config.style import Config
    from qzo_diffusion.runs.style.pipeline import quantized_transformer

    transformer = quantized_transformer(
        Config(data={"cache_dir": str(tmp_path_factory.mktemp("copies"))}),
        pipeline,
        CPU,
        torch.float32,
    )
    return transformer, find_scales(transformer), load_vae(pipeline, SD3, CPU)


@pytest.fixture
def drawer(parts, pipeline):
    def build(guidance):
        return Drawer(
            SD3,
            parts[0],
            load_scheduler(pipeline, SD3),
            parts[2],
            steps=STEPS,
            guidance=guidance,
            decoded_at_once=2,
            dtype=torch.float32,
        )

    return build


@pytest.fixture
def batch():
    """Three prompts with the noise of seeds 5, 6 and 7."""
    noise = torch.cat(
        [
            torch.randn((1, 16, SIDE // 8, SIDE // 8), generator=torch.Generator().manual_seed(at))
            for at in range(SEED, SEED + 3)
        ]
    )
    prompts = [encoded(at) for at in range(3)]
    return PictureBatch.of(noise, ("a", "b", "c"), prompts, [encoded(at + 10) for at in range(3)])


@pytest.mark.parametrize("guidance", GUIDANCE)
def test_pictures_are_those_of_the_pipeline(parts, pipeline, drawer, batch, guidance):
    sampler = Sampler(
        SD3,
        parts[0],
        load_scheduler(pipeline, SD3),
        parts[2],
        [encoded(at) for at in range(3)],
        [encoded(at + 10) for at in range(3)],
        width=SIDE,
        height=SIDE,
        steps=STEPS,
        guidance=guidance,
        seed=SEED,
        batch_size=3,
        device=CPU,
        dtype=torch.float32,
    )
    drawn = drawer(guidance)
    torch.testing.assert_close(drawn.latents(batch), sampler.latents(0), rtol=1e-4, atol=1e-4)
    for own, other in zip(drawn.pictures(batch), sampler.images(), strict=True):
        assert own.size == other.size == (SIDE, SIDE)
        difference = torch.tensor(list(own.tobytes())) - torch.tensor(list(other.tobytes()))
        assert difference.abs().max() <= 1


@pytest.mark.parametrize("guidance", GUIDANCE)
def test_both_halves_of_a_picture_see_its_own_factors(parts, drawer, batch, guidance):
    """Three pictures under three directions together are each alone under its own."""
    _, scales, _ = parts
    theta, draw = parametrize(scales, "separable"), drawer(guidance)
    directions = directions_of_step(0, 0, 3, "rademacher")
    with scales.override(*theta.probes(directions, [0.05])):
        together = draw.latents(batch)
    for at, direction in enumerate(directions):
        with scales.override(theta.perturbed(direction, 0.05)):
            alone = draw.latents(batch.part(slice(at, at + 1)))
        torch.testing.assert_close(together[at : at + 1], alone, rtol=1e-3, atol=1e-3)
        with scales.override(theta.perturbed(directions[at - 1], 0.05)):
            other = draw.latents(batch.part(slice(at, at + 1)))
        assert not torch.allclose(together[at : at + 1], other, rtol=1e-3, atol=1e-3)


def test_a_batch_is_split_and_repeated_with_its_texts(batch):
    assert [part.texts for part in batch.split(2)] == [("a", "b"), ("c",)]
    twice = batch.repeated(2)
    assert twice.texts == ("a", "b", "c") * 2
    assert len(twice) == 6
    assert torch.equal(twice.noise[3:], batch.noise)
    assert torch.equal(twice.part(slice(4, 5)).pooled, batch.pooled[1:2])


def brightness(pictures, prompts):
    return [sum(picture.convert("L").tobytes()) / 1e4 for picture in pictures]


def test_a_person_who_looks_later_gives_the_same_derivatives(parts, drawer, batch):
    """Pictures are drawn first and scored later; the order is that of the calls."""
    _, scales, _ = parts
    theta, draw = parametrize(scales, "separable"), drawer(0.0)
    step = StepBatch(batch.split(1))
    settings = Probing(0, 0.05, 1, **PROBING)

    def probed(objective):
        return probe(objective, step, theta, settings, 3)

    calls = []
    shown = Shown(draw.pictures, lambda pictures, texts: calls.append((pictures, texts)))
    assert not any(probed(shown).projected_grad)
    assert [texts for _, texts in calls] == [(one, one) for one in "abc"]  # at +ε and -ε
    losses = [-value for call in calls for value in brightness(*call)]
    told, scored = probed(Told(losses)), probed(RewardObjective(draw.pictures, brightness))
    assert told == scored
    assert all(map(abs, told.projected_grad))


def test_scales_are_as_they_were_after_a_reward_that_raises(parts, drawer, batch):
    _, scales, _ = parts
    before = {name: scales[name].clone() for name in scales}

    def broken(pictures, prompts):
        raise KeyboardInterrupt

    theta, objective = (
        parametrize(scales, "separable"),
        RewardObjective(drawer(0.0).pictures, broken),
    )
    with pytest.raises(KeyboardInterrupt):
        probe(objective, StepBatch([batch]), theta, Probing(0, 0.05, 1, **PROBING), 0)
    scales.close()
    assert all(torch.equal(before[name], scales[name]) for name in scales)
