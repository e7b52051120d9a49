"""Pictures of families whose VAE is of another kind, or whose guidance is: drawn, encoded and
decoded as by the plain pipelines.
"""

import json

import pytest
import torch
from diffusers import DiffusionPipeline

from benchmarks.families import small
from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.diffusion.cache import TensorCache
from qzo_diffusion.diffusion.families import registry
from qzo_diffusion.diffusion.families.packing import packed
from qzo_diffusion.diffusion.model_folder import is_distilled, load_scheduler
from qzo_diffusion.diffusion.prompt_encoder import PromptEncoder
from qzo_diffusion.diffusion.sampling import Sampler
from qzo_diffusion.diffusion.vae import (
    drop_encoder_,
    image_encoder,
    load_vae,
    pixels_of,
    read_vae_config,
)
from qzo_diffusion.rewards.drawing import Drawer
from qzo_diffusion.rewards.pictures import PictureBatch

CPU = torch.device("cpu")
NAMES = ["flux2", "qwen_image"]
PROMPTS, NEGATIVE = ("a red apple", "a pear"), ""
GUIDANCE, STEPS = 3.0, 2


@pytest.fixture(params=NAMES)
def family(request):
    return registry.by_name(request.param)


@pytest.fixture
def plain(made, family):
    pipeline = DiffusionPipeline.from_pretrained(made(family.name, {}))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn_by(pipeline, family, prompt, seed):
    """The picture [3, H, W] in [0, 1] of the plain pipeline."""
    own = {"negative_prompt": NEGATIVE} if family.name == "qwen_image" else {}
    return pipeline(
        prompt=prompt,
        height=small.SIDE,
        width=small.SIDE,
        num_inference_steps=STEPS,
        max_sequence_length=small.LENGTHS.get(family.name, small.LENGTH),
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
        **{family.sampling.guidance_argument: GUIDANCE},
        **own,
    ).images[0]


def test_a_sampler_and_a_drawer_give_the_plain_pipelines_pictures(made, tmp_path, family, plain):
    folder = made(family.name, {})
    encoder = PromptEncoder(
        folder, TensorCache(tmp_path), family=family, device=CPU, dtype=torch.float32
    )
    encoded = encoder.encode([*PROMPTS, NEGATIVE])
    prompts, negatives = [encoded[one] for one in PROMPTS], [encoded[NEGATIVE]] * len(PROMPTS)
    vae = load_vae(folder, family, CPU)
    drop_encoder_(vae)
    parts = (family, plain.transformer, load_scheduler(folder, family), vae)
    sampler = Sampler(
        *parts,
        prompts,
        negatives,
        width=small.SIDE,
        height=small.SIDE,
        steps=STEPS,
        guidance=GUIDANCE,
        seed=5,
        batch_size=2,
        device=CPU,
        dtype=torch.float32,
    )
    latents = sampler.latents(0)
    with torch.no_grad():
        pixels = [pixels_of(vae, one[None])[0].clamp(-1, 1) / 2 + 0.5 for one in latents]
    for index, prompt in enumerate(PROMPTS):
        wanted = drawn_by(plain, family, prompt, seed=5 + index)
        torch.testing.assert_close(pixels[index], wanted, rtol=0, atol=1e-4)
    drawer = Drawer(*parts, steps=STEPS, guidance=GUIDANCE, decoded_at_once=1, dtype=torch.float32)
    noise = torch.cat([noise_of(family, 5 + index) for index in range(len(PROMPTS))])
    batch = PictureBatch.of(noise, PROMPTS, prompts, negatives)
    torch.testing.assert_close(drawer.latents(batch), latents, rtol=1e-3, atol=1e-3)


def noise_of(family, seed):
    """The noise [1, C, h, w] that the plain pipeline begins with."""
    side = small.SIDE // 8
    shape = (1, 128, side // 2, side // 2) if family.name == "flux2" else (1, 16, side, side)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.pixel_shuffle(noise, 2) if family.name == "flux2" else noise


def test_pixels_become_the_latents_of_the_plain_pipeline(made, family, plain):
    vae = load_vae(made(family.name, {}), family, CPU)
    pixels = torch.linspace(-1, 1, 3 * small.SIDE**2).view(1, 3, small.SIDE, small.SIDE)
    ours = image_encoder(vae)(pixels)
    with torch.no_grad():
        if family.name == "flux2":
            wanted = plain._pack_latents(plain._encode_vae_image(pixels, None))
        else:
            mean, std = (
                torch.tensor(plain.vae.config[name]).view(1, -1, 1, 1)
                for name in ("latents_mean", "latents_std")
            )
            plainly = plain.vae.encode(pixels.unsqueeze(2)).latent_dist.mode()[:, :, 0]
            wanted = packed((plainly - mean) / std)
    assert torch.equal(packed(ours), wanted)
    assert ours.shape == (1, family.denoiser.shape(plain.transformer.config).channels, 4, 4)


def test_tiles_are_encoded_and_decoded(made, family):
    vae = load_vae(made(family.name, {}), family, CPU, tile=32)
    pixels = torch.zeros(1, 3, 64, 64)
    latents = image_encoder(vae)(pixels)
    assert latents.shape[-2:] == (8, 8)
    with torch.no_grad():
        assert pixels_of(vae, latents).shape == pixels.shape


WRONG = {
    "flux2": [("latent_channels", 0), ("batch_norm_eps", None), ("_class_name", "AutoencoderKL")],
    "qwen_image": [
        ("z_dim", "16"),
        ("dim_mult", []),
        ("latents_std", [0.0] * 16),
        ("latents_mean", [0.0] * 3),
        ("temperal_downsample", True),
    ],
}


@pytest.mark.parametrize(("name", "key", "value"), [(n, *one) for n in WRONG for one in WRONG[n]])
def test_a_wrong_setting_of_a_vae_is_named(made, tmp_path, name, key, value):
    config = json.loads((made(name, {}) / "vae/config.json").read_text())
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config | {key: value}))
    with pytest.raises(ModelError, match=key):
        read_vae_config(file, registry.by_name(name))


def test_a_distilled_model_says_so_in_its_index(made):
    family = registry.by_name("flux2")
    assert is_distilled(made("flux2", {"distilled": True}), family)
    assert not is_distilled(made("flux2", {}), family)
