"""A family is found from a single file's metadata or names where no index tells it."""

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.families import small
from benchmarks.families.__main__ import main
from qzo_diffusion import cli as command_line
from qzo_diffusion.core.errors import ConfigError, ModelError
from qzo_diffusion.diffusion.families import registry
from qzo_diffusion.diffusion.model_folder import family_of_folder
from tests.conftest import failing

KEYS = {
    "sd3": "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",
    "flux1": "double_blocks.0.img_attn.qkv.weight",
    "zimage": "noise_refiner.0.attention.qkv.weight",
    "flux2": "double_stream_modulation_img.lin.weight",
    "qwen_image": "model.diffusion_model.transformer_blocks.0.img_mlp.net.2.weight",
}


@pytest.mark.parametrize("name", KEYS)
def test_by_the_names_in_a_file(tmp_path, name):
    file = tmp_path / "model.safetensors"
    save_file({KEYS[name]: torch.ones(6, 2)}, file)
    assert family_of_folder(tmp_path, None, file).name == name


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        *(("sd3", "sd3"), ("flux", "flux1"), ("flux2", "flux2"), ("qwen_image", "qwen_image")),
        *(("sdxl", "sdxl"), ("sd1", "sd15"), ("sd2", "sd15"), ("lumina2", "zimage")),
    ],
)
def test_by_the_metadata_of_a_gguf_file(tmp_path, architecture, name):
    file = gguf_file(tmp_path, architecture, "any.weight")
    assert family_of_folder(tmp_path, None, file).name == name


def gguf_file(folder, architecture, *names):
    file = folder / "model.gguf"
    writer = gguf.GGUFWriter(file, architecture)
    for name in names:
        writer.add_tensor(name, np.ones((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_layers_tell_a_family_before_its_metadata(tmp_path):
    file = gguf_file(tmp_path, "flux", KEYS["flux1"], KEYS["flux2"])
    assert family_of_folder(tmp_path, None, file).name == "flux2"


def test_by_name_before_all(tmp_path):
    assert family_of_folder(tmp_path, "sdxl") is registry.by_name("sdxl")
    with pytest.raises(ConfigError) as raised:
        family_of_folder(tmp_path, "sd9")
    assert all(family.name in raised.value.expected for family in registry.FAMILIES)


@pytest.mark.parametrize(
    ("inside", "title"),
    [
        ("conditioner.embedders.0.transformer.text_model.final_layer_norm.bias", "Diffusion XL"),
        ("cond_stage_model.transformer.text_model.final_layer_norm.bias", "Diffusion 1 or 2"),
    ],
)
@pytest.mark.parametrize("flag", ["--model", "--transformer"])
def test_a_checkpoint_of_a_unet_is_to_be_made_a_folder(made, tmp_path, capsys, inside, title, flag):
    unet = "model.diffusion_model.input_blocks.0.0.weight"
    file = tmp_path / "dreams.safetensors"
    save_file({name: torch.ones(2, 2) for name in (unet, inside)}, file)
    model = [] if flag == "--model" else ["--model", str(made("sdxl", {}))]
    command = ["train", "--dry-run", *model, flag, str(file), "--style-dir", str(tmp_path)]
    error = failing(capsys, command_line.main(command))
    assert title in error
    assert "from_single_file" in error


def test_nothing_tells_it(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"any.weight": torch.ones(2, 2)}, file)
    with pytest.raises(ModelError, match=r"no model_index\.json"):
        family_of_folder(tmp_path, None, file)


def test_a_small_pipeline_is_made_by_a_command(tmp_path, capsys):
    main(["make", "sd15", str(tmp_path / "model")])
    assert family_of_folder(tmp_path / "model").name == "sd15"
    for wrong in (["make", "sd9", str(tmp_path)], ["make", "sd15"], ["sd9"]):
        with pytest.raises(SystemExit):
            main(wrong)
    assert small.NAMES[0] in capsys.readouterr().err
