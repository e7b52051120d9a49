"""The single-file layouts of families, against diffusers' own converters."""

import inspect

import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file

from benchmarks.families import small
from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.diffusion.families.flux1_layout import FLUX1_LAYOUT
from qzo_diffusion.diffusion.families.flux2_layout import FLUX2_LAYOUT
from qzo_diffusion.diffusion.families.qwen_image_layout import QWEN_IMAGE_LAYOUT
from qzo_diffusion.diffusion.families.registry import of_names
from qzo_diffusion.diffusion.families.zimage_layout import ZIMAGE_LAYOUT
from qzo_diffusion.diffusion.original_layout import PREFIX
from qzo_diffusion.diffusion.transformer import find_transformer
from qzo_diffusion.quant.weights import Pending, write_tensors

WIDTH = "inner_dim = 3072"  # is written into the converter


def converted(tensors, width):
    """What diffusers' own converter makes of a file, with the width of a small model."""
    own = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers
    source = inspect.getsource(own)
    assert WIDTH in source
    names = dict(vars(single_file_utils))
    exec(source.replace(WIDTH, f"inner_dim = {width}"), names)
    return names[own.__name__](tensors)


def written(file, model, layout):
    """The file of a model in a layout."""
    pending = {name: Pending.of(tensor) for name, tensor in model.state_dict().items()}
    write_tensors(file, layout.to_original(pending, model.config), {})
    return file


def check_read(file, model, *settings):
    """The file is read as the model that it holds."""
    state, found = model.state_dict(), find_transformer(file)
    assert found.entries.keys() == state.keys()
    assert all(torch.equal(found.entries[name].read(), state[name]) for name in state)
    for name in settings:
        assert found.config[name] == model.config[name]
    assert tuple(found.config["axes_dims_rope"]) == tuple(model.config["axes_dims_rope"])
    return found


@pytest.mark.parametrize("guidance", [True, False])
def test_diffusers_own_converter_gives_every_tensor_back(tmp_path, guidance):
    model = small.flux1(guidance)["transformer"]
    state = model.state_dict()
    file = written(tmp_path / "single.safetensors", model, FLUX1_LAYOUT)
    back = converted(load_file(file), model.inner_dim)
    assert state.keys() == back.keys()
    assert [name for name in state if not torch.equal(state[name], back[name])] == []
    sizes = ("num_layers", "num_single_layers", "guidance_embeds", "attention_head_dim")
    found = check_read(file, model, *sizes)
    assert of_names([*found.entries]) is None  # under diffusers' names now


def test_the_converter_of_flux2_gives_every_tensor_back(tmp_path):
    model = small.flux2()["transformer"]
    state = model.state_dict()
    file = written(tmp_path / "single.safetensors", model, FLUX2_LAYOUT)
    named = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(file).items()}
    back = single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers(named)
    assert state.keys() == back.keys()
    assert [name for name in state if not torch.equal(state[name], back[name])] == []
    sizes = ("num_layers", "num_single_layers", "attention_head_dim", "mlp_ratio")
    check_read(file, model, *sizes, "joint_attention_dim", "timestep_guidance_channels")


@pytest.mark.parametrize("beside", [False, True])  # an export writes both layouts into a folder
@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_a_single_file_of_qwen_image_has_diffusers_names(tmp_path, prefix, beside):
    model = small.qwen_image()["transformer"]
    file = tmp_path / "single.safetensors"
    if beside:
        model.save_config(tmp_path)
    save_file({f"{prefix}{name}": one for name, one in model.state_dict().items()}, file)
    check_read(file, model, "num_layers", "num_attention_heads", "out_channels", "in_channels")
    mine = load_file(written(tmp_path / "mine.safetensors", model, QWEN_IMAGE_LAYOUT))
    assert {name.removeprefix(PREFIX) for name in mine} == model.state_dict().keys()


def test_a_file_of_zimage_is_converted_as_diffusers_does(tmp_path):
    model = small.zimage()["transformer"]
    state = model.state_dict()
    pending = {name: Pending.of(tensor) for name, tensor in state.items()}
    file = tmp_path / "single.safetensors"
    write_tensors(file, ZIMAGE_LAYOUT.to_original(pending, model.config), {})
    own = single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers
    back, found = own(load_file(file)), find_transformer(file)
    assert state.keys() == back.keys() == found.entries.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, back[name])
        assert torch.equal(tensor, found.entries[name].read())
    told = found.config.keys() - {"_class_name", "axes_lens"}
    assert {name: found.config[name] for name in told} == {
        name: list(one) if isinstance(one := model.config[name], tuple) else one for name in told
    }


def test_a_file_without_tokens_of_padding_is_of_another_family(tmp_path):
    model = small.zimage()["transformer"]
    pending = {name: Pending.of(tensor) for name, tensor in model.state_dict().items()}
    layout = ZIMAGE_LAYOUT.to_original(pending, model.config)
    file = tmp_path / "single.safetensors"
    write_tensors(file, {name: one for name, one in layout.items() if "pad_token" not in name}, {})
    with pytest.raises(ModelError, match="Lumina"):
        find_transformer(file)
