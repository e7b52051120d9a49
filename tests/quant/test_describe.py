"""Files and names that can't be used are called what they are, and the advice can help."""

import struct
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.diffusion.transformer import find_transformer
from qzo_diffusion.quant.describe import described, described_tensors, is_language_model
from qzo_diffusion.quant.header import read_header
from qzo_diffusion.runs.hub import not_here
from qzo_diffusion.runs.llm.models import choose_lm


def gguf_of(architecture):
    name, key = architecture.encode(), b"general.architecture"
    pair = struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, len(name)) + name
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + pair


CONTENT = {
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
    "GGUF of pictures": (gguf_of("sd3"), r"a diffusion model \(sd3\)"),
    "GGUF of FLUX": (gguf_of("flux"), r"a diffusion model \(flux\)"),
    "GGUF of texts": (gguf_of("llama"), r"a language model \(llama\)"),
    "pickle": (b"\x80\x02}q\x00.", "a pickle"),
    "page": (b"<!DOCTYPE html><html>404</html>", "a web page"),
    "ONNX": (b"\x08\x07\x12\x07pytorch\x1a\x051.13" + b"x" * 99, "an ONNX graph"),
    "zeros": (bytes(4096), "zeros alone"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + b"x" * 99, "HDF5"),
}


@pytest.mark.parametrize(("content", "told"), CONTENT.values(), ids=CONTENT.keys())
def test_a_file_is_called_what_its_first_bytes_say(tmp_path, content, told):
    file = tmp_path / "transformer.safetensors"
    file.write_bytes(content)
    kind = described(file)
    assert kind is not None
    with pytest.raises(ModelError, match=told):
        read_header(file)
    with pytest.raises(ModelError, match=told):
        choose_lm(str(file)) if not content.startswith(b"GGUF") else read_header(file)


def test_torch_archives_and_other_archives_are_told_apart(tmp_path):
    for inside, told in (("archive/data.pkl", "a pickle"), ("readme.txt", "a zip archive")):
        with zipfile.ZipFile(tmp_path / "file.pt", "w") as archive:
            archive.writestr(inside, b"x")
        assert described(tmp_path / "file.pt").name.startswith(told)


def test_a_plain_file_is_not_called_anything(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "file.safetensors")
    assert described(tmp_path / "file.safetensors") is None
    assert described(tmp_path / "absent") is None


TENSORS = {
    "lora_unet_joint_blocks_0_attn.lora_down.weight": "a LoRA",
    "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": "a LoRA",
    "double_blocks.0.img_attn.qkv.weight": "FLUX",
    "single_transformer_blocks.0.attn.to_q.weight": "without its config.json",
    "down_blocks.0.resnets.0.conv1.weight": "without its config.json",
    "model.diffusion_model.input_blocks.0.0.weight": "U-Net",
    "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias": "XL",
    "text_model.encoder.layers.0.mlp.fc1.weight": "a CLIP text encoder alone",
    "encoder.block.0.layer.0.SelfAttention.q.weight": "a T5 text encoder alone",
    "decoder.up_blocks.0.resnets.0.conv1.weight": "a VAE alone",
    "model.layers.0.self_attn.q_proj.weight": "a language model",
    "transformer_blocks.0.img_mlp.net.0.proj.weight": "Qwen-Image",
    "transformer_blocks.0.attn.add_q_proj.weight": "without its config.json",
    "controlnet_blocks.0.weight": "a ControlNet",
}


@pytest.mark.parametrize(("name", "told"), TENSORS.items())
def test_a_transformer_of_another_kind_is_named(tmp_path, name, told):
    save_file({name: torch.ones(4, 4)}, tmp_path / "file.safetensors")
    with pytest.raises(ModelError, match=told) as raised:
        find_transformer(tmp_path / "file.safetensors")
    assert "download" not in raised.value.remedy


def test_a_transformer_of_ours_is_not_called_another(tmp_path):
    names = ["joint_blocks.0.x_block.attn.qkv.weight", "pos_embed", "x_embedder.proj.weight"]
    assert described_tensors(names) is None


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("black-forest-labs/FLUX.2-dev", "FLUX"),
        ("Wan-AI/Wan2.2-T2V-A14B-Diffusers", "Wan"),
    ],
)
def test_a_model_of_another_family_is_not_to_be_downloaded(name, family):
    error = not_here(name)
    assert family in error.got
    assert error.expected.startswith("a model of a known family")
    assert "hf download" not in str(error)


@pytest.mark.parametrize(
    "name",
    [
        "stabilityai/stable-diffusion-3.5-large",
        "someone/sd3-anime",
        "black-forest-labs/FLUX.1-dev",
        "stabilityai/stable-diffusion-xl-base-1.0",
        "runwayml/stable-diffusion-v1-5",
    ],
)
def test_a_model_of_a_known_family_may_be_downloaded(name):
    assert "hf download" in not_here(name).remedy


def test_language_models_and_pictures_are_sent_to_their_own_verb():
    assert is_language_model("HuggingFaceTB/SmolLM2-135M")
    assert "qzo-diffuse llm" in not_here("meta-llama/Llama-3.1-8B").remedy
    with pytest.raises(ModelError, match="qzo-diffuse train"):
        choose_lm("black-forest-labs/FLUX.1-dev")
    assert "correct the path" in not_here("/models/sd3.safetensors").remedy
