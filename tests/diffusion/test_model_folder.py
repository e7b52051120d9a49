"""Whole, partial, damaged and dangerous model folders; encoding once; freeing what is not
needed.
"""

import json
import shutil

import pytest
import torch

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.diffusion import vae
from qzo_diffusion.diffusion.cache import TensorCache
from qzo_diffusion.diffusion.encoded_prompt import stack_prompts
from qzo_diffusion.diffusion.families.sd3 import SD3
from qzo_diffusion.diffusion.model_folder import (
    check_model_folder,
    family_of_folder,
    fingerprint_of_files,
    native_resolution,
)
from qzo_diffusion.diffusion.prompt_encoder import PromptEncoder
from qzo_diffusion.resources import tiny_model

CPU = torch.device("cpu")


@pytest.fixture
def model(tmp_path):
    """A copy of the embedded model that may be damaged."""
    return shutil.copytree(tiny_model(), tmp_path / "model")


def test_the_embedded_model_is_whole():
    check_model_folder(tiny_model(), SD3)


@pytest.mark.parametrize(
    "part", ["transformer", "vae", "scheduler", "text_encoder", "text_encoder_2", "tokenizer"]
)
def test_a_missing_part_is_named(model, part):
    shutil.rmtree(model / part)
    with pytest.raises(ModelError, match=f"lacks the part {part}/"):
        check_model_folder(model, SD3)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder_3"])
def test_pickles_are_never_read(model, part):
    for file in (model / part).glob("*.safetensors"):
        file.rename(file.with_name("diffusion_pytorch_model.bin"))
    with pytest.raises(ModelError, match=f"{part}/ holds pickles only"):
        check_model_folder(model, SD3)


def test_a_part_without_weights_is_named(model):
    for file in (model / "vae").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ModelError, match="vae/ holds no weights"):
        check_model_folder(model, SD3)


@pytest.mark.parametrize("index", ["{", "[]", '{"vae": []}'])
def test_a_damaged_index_is_an_error_for_the_user(model, index):
    (model / "model_index.json").write_text(index)
    with pytest.raises(ModelError):
        check_model_folder(model, SD3)


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(ModelError, match=r"no model_index\.json"):
        family_of_folder(tmp_path)


def test_resolution_comes_from_the_model():
    assert native_resolution(tiny_model(), SD3) == 64


def test_prompts_are_encoded_once_and_then_read_from_the_cache(tmp_path, monkeypatch):
    cache = TensorCache(tmp_path)
    first = PromptEncoder(tiny_model(), cache, family=SD3, device=CPU, dtype=torch.float32)
    encoded = first.encode(["red apple", "", "red apple"])
    second = PromptEncoder(tiny_model(), cache, family=SD3, device=CPU, dtype=torch.float32)
    monkeypatch.setattr(second, "_load", lambda part: pytest.fail("an encoder was loaded again"))
    again = second.encode(["red apple", ""])
    for prompt in ("red apple", ""):
        assert torch.equal(encoded[prompt].embeds, again[prompt].embeds)
        assert torch.equal(encoded[prompt].pooled, again[prompt].pooled)
    assert not torch.equal(encoded[""].pooled, encoded["red apple"].pooled)


def test_shapes_are_those_the_transformer_expects(tmp_path):
    config = json.loads((tiny_model() / "transformer" / "config.json").read_text())
    encoder = PromptEncoder(
        tiny_model(), TensorCache(tmp_path), family=SD3, device=CPU, dtype=torch.float32
    )
    one = encoder.encode(["red apple"])["red apple"]
    assert one.embeds.shape[1] == config["joint_attention_dim"]
    assert one.pooled.shape == (config["pooled_projection_dim"],)
    embeds, pooled = stack_prompts([one, one])
    assert embeds.shape[0] == pooled.shape[0] == 2


def test_truncated_prompts_are_told(tmp_path):
    encoder = PromptEncoder(
        tiny_model(), TensorCache(tmp_path), family=SD3, device=CPU, dtype=torch.float32
    )
    encoded = encoder.encode(["red apple", "red apple " * 200])
    short, long = encoded["red apple"], encoded["red apple " * 200]
    assert (short.truncated, long.truncated) == (False, True)
    assert long.tokens > 200 > short.tokens > 0


def test_the_length_of_t5_is_a_setting(tmp_path):
    lengths = []
    for tokens in (4, 8):
        encoder = PromptEncoder(
            tiny_model(),
            TensorCache(tmp_path),
            family=SD3,
            device=CPU,
            dtype=torch.float32,
            t5_tokens=tokens,
        )
        lengths.append(encoder.encode(["red apple"])["red apple"].embeds.shape[0])
    assert lengths[1] - lengths[0] == 4


def test_latents_are_shifted_and_scaled_and_can_be_decoded_without_the_encoder():
    decoder = vae.load_vae(tiny_model(), SD3, CPU)
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = vae.image_encoder(decoder)(images)
    with torch.no_grad():
        mean = decoder.encode(images).latent_dist.mean
        assert latents.shape == (1, 16, 8, 8)
        assert torch.equal(
            latents, (mean - decoder.config.shift_factor) * decoder.config.scaling_factor
        )
        vae.drop_encoder_(decoder)
        assert decoder.decode(mean).sample.shape == images.shape


def test_a_changed_file_changes_the_fingerprint(model):
    before = fingerprint_of_files(model, ("vae",))
    assert before == fingerprint_of_files(tiny_model(), ("vae",))
    file = next((model / "vae").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert before != fingerprint_of_files(model, ("vae",))
