"""A transformer of pictures in one GGUF file: read into modules, and written again."""

import gguf
import pytest
import torch

from benchmarks.families import small
from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.diffusion.families.flux1 import FLUX1
from qzo_diffusion.diffusion.families.sd3_layout import SD3_LAYOUT
from qzo_diffusion.diffusion.transformer import empty_transformer, find_transformer
from qzo_diffusion.quant.fits import check_fits
from qzo_diffusion.quant.gguf import FACTORS, GgufLinear
from qzo_diffusion.quant.load import find_scales
from qzo_diffusion.quant.stream import Quantization, fill_
from tests.gguf_pictures import plain_weights, write_gguf
from tests.small_models import sd3_inputs, sd3_transformer

KINDS = ["large", "medium", "sd3"]


def loaded(file, dtype=torch.float32):
    found = find_transformer(file)
    model = empty_transformer(found.config)
    check_fits(model, found.entries)
    fill_(model, found.entries, Quantization(), dtype=dtype, device=torch.device("cpu"))
    return model


def forward(model):
    with torch.no_grad():
        return model(**sd3_inputs(model)).sample


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_modules_hold_what_the_names_of_the_file_mean(tmp_path, kind, prefix):
    """The weights of the file, dequantized by its own package, in the unquantized model."""
    model = sd3_transformer(kind)
    file = write_gguf(tmp_path / "small.gguf", model, "Q4_0", prefix)
    read = loaded(file)
    in_blocks = [name for name, one in read.named_modules() if isinstance(one, GgufLinear)]
    assert {"transformer_blocks.0.attn.to_k", "transformer_blocks.2.norm1_context.linear"} <= set(
        in_blocks
    )
    assert not any(name.startswith(("proj_out", "norm_out")) for name in in_blocks)
    pieces = diffusers_converter(plain_weights(file), model.config)
    model.load_state_dict(pieces)
    torch.testing.assert_close(forward(read), forward(model), rtol=1e-4, atol=1e-5)


def diffusers_converter(tensors, config):
    from diffusers.loaders.single_file_utils import (
        convert_sd3_transformer_checkpoint_to_diffusers,
    )

    return convert_sd3_transformer_checkpoint_to_diffusers(dict(tensors))


def test_flux_is_read_as_well(tmp_path):
    """A fused `linear1` is four layers, of unequal height."""
    model = small.flux1(True)["transformer"]
    file = write_gguf(tmp_path / "flux.gguf", model, "Q8_0")
    found, plain = find_transformer(file, FLUX1), plain_weights(file)
    read = loaded(file)
    single = "single_transformer_blocks.0"
    parts = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    layers = [read.get_submodule(f"{single}.{part}") for part in parts]
    assert all(isinstance(layer, GgufLinear) for layer in layers)
    whole = torch.cat([layer.dequantized() for layer in layers])
    torch.testing.assert_close(whole, plain["single_blocks.0.linear1.weight"], rtol=1e-6, atol=1e-8)
    assert found.entries[f"{single}.proj_mlp.weight"].blocks == "Q8_0"
    swapped = read.norm_out.linear.weight.chunk(2)
    assert torch.equal(torch.cat(swapped[::-1]), plain["final_layer.adaLN_modulation.1.weight"])


@pytest.mark.parametrize("kind", FACTORS)
def test_every_type_of_block_is_read_row_range_by_row_range(tmp_path, kind):
    model = sd3_transformer(layers=2, width=4)
    file = write_gguf(tmp_path / "small.gguf", model, kind)
    read = loaded(file)
    expected = diffusers_converter(plain_weights(file), model.config)
    layers = {name: one for name, one in read.named_modules() if isinstance(one, GgufLinear)}
    assert len(layers) > 20
    for name, layer in layers.items():
        assert layer.kind == kind
        wanted = expected[f"{name}.weight"]
        torch.testing.assert_close(layer.dequantized(), wanted, rtol=1e-6, atol=1e-8)
    assert len(find_scales(read)) == len(layers)


def test_a_file_in_blocks_gets_no_other_quantization(tmp_path):
    read = loaded(write_gguf(tmp_path / "small.gguf", sd3_transformer()))
    kinds = {type(one).__name__ for one in read.modules()}
    assert "GgufLinear" in kinds
    assert "Linear4bit" not in kinds


def test_a_dropped_dimension_of_the_positions_is_put_back(tmp_path):
    """llama.cpp's tools write a shape without its leading ones."""
    model = sd3_transformer()
    dropped = tuple(model.pos_embed.pos_embed.shape)[1:]
    file = write_gguf(tmp_path / "small.gguf", model, positions=dropped)
    entries = find_transformer(file).entries
    assert entries["pos_embed.pos_embed"].shape == tuple(model.pos_embed.pos_embed.shape)


def test_a_language_model_is_told(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "llama.gguf", "llama")
    writer.add_tensor("blk.0.attn_q.weight", torch.ones(4, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"of a language model \(llama\)"):
        find_transformer(tmp_path / "llama.gguf")


def test_a_file_without_a_tensor_is_told(tmp_path):
    from qzo_diffusion.diffusion.transformer import gguf_transformer

    entries = gguf_transformer(write_gguf(tmp_path / "small.gguf", sd3_transformer()))
    config = SD3_LAYOUT.config_of(entries)
    del entries["joint_blocks.1.x_block.attn.qkv.weight"]
    with pytest.raises(ModelError, match=r"joint_blocks\.1\.x_block\.attn\.qkv\.weight"):
        SD3_LAYOUT.to_diffusers(entries, config)
