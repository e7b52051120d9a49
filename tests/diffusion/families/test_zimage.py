"""Z-Image: prompts of different lengths, its own count of guidance, and probes of examples."""

import pytest
import torch

from benchmarks.families import small
from qzo_diffusion.core.noise import directions_of_step
from qzo_diffusion.core.parametrize import parametrize
from qzo_diffusion.diffusion.encoded_prompt import EncodedPrompt
from qzo_diffusion.diffusion.families.zimage import ZIMAGE
from qzo_diffusion.diffusion.sampling import Sampler
from qzo_diffusion.quant.choose import last_readers
from qzo_diffusion.quant.load import find_scales, quantize_
from qzo_diffusion.rewards.drawing import Drawer
from qzo_diffusion.rewards.pictures import PictureBatch

CPU, SIDE, STEPS = torch.device("cpu"), 32, 2
LENGTHS = (3, 40)  # one run of 32 tokens, and two


@pytest.fixture(scope="module")
def parts():
    made = small.zimage()
    quantize_(made["transformer"], skip=ZIMAGE.denoiser.skip)
    return made


def encoded(count, seed):
    embeds = torch.randn(48, 64, generator=torch.Generator().manual_seed(seed))
    embeds[count:] = 0
    return EncodedPrompt(embeds, torch.tensor([count]), count, False)


def prompts(seed):
    return [encoded(count, seed + count) for count in LENGTHS]


@pytest.fixture(scope="module")
def batch():
    noise = [
        torch.randn((1, 16, SIDE // 8, SIDE // 8), generator=torch.Generator().manual_seed(at))
        for at in range(2)
    ]
    return PictureBatch.of(torch.cat(noise), ("a", "b"), prompts(0), prompts(9))


def drawer(parts, guidance):
    return Drawer(
        ZIMAGE,
        parts["transformer"],
        parts["scheduler"],
        parts["vae"],
        steps=STEPS,
        guidance=guidance,
        decoded_at_once=2,
        dtype=torch.float32,
    )


@pytest.mark.parametrize("guidance", [0.0, 0.5, 3.0])
def test_pictures_of_a_reward_are_those_of_the_pipeline(parts, batch, guidance):
    sampler = Sampler(
        ZIMAGE,
        parts["transformer"],
        parts["scheduler"],
        parts["vae"],
        prompts(0),
        prompts(9),
        width=SIDE,
        height=SIDE,
        steps=STEPS,
        guidance=guidance,
        seed=0,
        batch_size=2,
        device=CPU,
        dtype=torch.float32,
    )
    found = drawer(parts, guidance).latents(batch)
    torch.testing.assert_close(found, sampler.latents(0), rtol=1e-4, atol=1e-4)


def test_each_example_sees_its_own_factors(parts, batch):
    scales, draw = find_scales(parts["transformer"]), drawer(parts, 3.0)
    theta = parametrize(scales, "separable")
    directions = directions_of_step(0, 0, 2, "rademacher")
    with scales.override(*theta.probes(directions, [0.05])):
        together = draw.latents(batch)
    for at, direction in enumerate(directions):
        with scales.override(theta.perturbed(direction, 0.05)):
            alone = draw.latents(batch.part(slice(at, at + 1)))
        torch.testing.assert_close(together[at : at + 1], alone, rtol=1e-3, atol=1e-3)


def test_inputs_that_nothing_reads_afterwards_may_be_overwritten(parts, batch):
    scales, draw = find_scales(parts["transformer"]), drawer(parts, 0.0)
    names = last_readers(scales)
    assert len(names) == 8  # of four blocks
    directions = directions_of_step(0, 0, 2, "rademacher")
    drawn = []
    for chosen in ((), names):
        theta = parametrize(scales, "separable", last_readers=chosen)
        with scales.override(*theta.probes(directions, [0.05])):
            drawn.append(draw.latents(batch))
    assert torch.equal(*drawn)
