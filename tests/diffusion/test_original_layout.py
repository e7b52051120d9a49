"""The single-file layout, against diffusers' own converter."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.diffusion.families.sd3_layout import SD3_LAYOUT
from qzo_diffusion.diffusion.original_layout import PREFIX
from qzo_diffusion.diffusion.transformer import empty_transformer, find_transformer
from qzo_diffusion.quant.load import quantize_
from qzo_diffusion.quant.stream import Quantization, fill_
from qzo_diffusion.quant.weights import Pending, read_entries, write_tensors
from tests.small_models import sd3_transformer

KINDS = ["large", "medium", "sd3"]


@pytest.fixture
def single_file(tmp_path):
    def write(model):
        pending = {name: Pending.of(tensor) for name, tensor in model.state_dict().items()}
        write_tensors(
            tmp_path / "single.safetensors", SD3_LAYOUT.to_original(pending, model.config), {}
        )
        return tmp_path / "single.safetensors"

    return write


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_own_converter_gives_every_tensor_back(single_file, tmp_path, kind):
    model = sd3_transformer(kind)
    model.save_config(tmp_path / "config")
    back = type(model).from_single_file(str(single_file(model)), config=str(tmp_path / "config"))
    state, read = model.state_dict(), back.state_dict()
    assert state.keys() == read.keys()
    assert [name for name in state if not torch.equal(state[name], read[name])] == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", [True, False])
def test_a_single_file_streams_like_the_folder(single_file, tmp_path, kind, prefix):
    model = sd3_transformer(kind)
    file = single_file(model)
    tensors = load_file(file)
    if prefix:
        tensors |= {
            "first_stage_model.decoder.conv_in.bias": torch.ones(3),
            "text_encoders.clip_l.logit_scale": torch.ones(1),
        }
    else:
        tensors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    save_file(tensors, file)
    found = find_transformer(file)
    own = [name for name in found.config if name not in ("sample_size", "_class_name")]
    assert {name: found.config[name] for name in own} == {
        name: list(model.config[name])
        if isinstance(model.config[name], tuple)
        else model.config[name]
        for name in own
    }
    streamed = empty_transformer(found.config)
    fill_(
        streamed,
        found.entries,
        Quantization(skip=("pos_embed",)),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    quantize_(model, skip=("pos_embed",))
    state, read = model.state_dict(), streamed.state_dict()
    assert state.keys() == read.keys()
    assert [name for name in state if not torch.equal(state[name], read[name])] == []


def test_a_file_that_lacks_a_tensor_or_is_another_model_is_told(single_file):
    file = single_file(sd3_transformer())
    entries = read_entries(file)
    config = SD3_LAYOUT.config_of(entries)
    del entries[f"{PREFIX}joint_blocks.1.x_block.attn.qkv.bias"]
    with pytest.raises(ModelError, match=r"joint_blocks\.1\.x_block\.attn\.qkv\.bias"):
        SD3_LAYOUT.to_diffusers(entries, config)
    with pytest.raises(ModelError, match="no denoiser of Stable Diffusion 3"):
        SD3_LAYOUT.config_of({"joint_blocks.0.x": entries[f"{PREFIX}pos_embed"]})
