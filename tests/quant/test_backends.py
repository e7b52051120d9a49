"""One contract for every back-end, and the traps of bitsandbytes."""

import copy

import pytest
import torch
from torch import nn

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.quant import bnb
from qzo_diffusion.quant.base import is_skipped
from qzo_diffusion.quant.load import codes_fingerprint, find_scales, handles_of, quantize_
from qzo_diffusion.quant.reference import dequantize_blockwise, quantize_blockwise
from tests.quantized import BACKENDS, inputs, network

WIDE = [(qt, bs) for qt in ("nf4", "fp4") for bs in (32, 64, 128, 256, 512)]


def unpacked(packed: torch.Tensor, shape) -> torch.Tensor:
    flat = packed.flatten()
    return torch.stack([flat >> 4, flat & 15], 1).view(shape)


@pytest.mark.parametrize(("quant_type", "blocksize"), WIDE)
def test_reference_and_bitsandbytes_store_the_same_codes_and_scales(quant_type, blocksize):
    ours = network("reference", quant_type, blocksize, width=512)
    theirs = network("bnb", quant_type, blocksize, width=512)
    for name in ("0", "2"):
        mine, other = ours.get_submodule(name), theirs.get_submodule(name)
        assert torch.equal(mine.codes, unpacked(other.weight.data, mine.codes.shape))
        assert torch.equal(mine.absmax, other.weight.quant_state.absmax)


@pytest.mark.parametrize(("quant_type", "blocksize"), WIDE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_and_bitsandbytes_forward_agree_within_rounding(quant_type, blocksize, dtype):
    width = 512
    ours = network("reference", quant_type, blocksize, width=width)[0].to(dtype)
    theirs = network("bnb", quant_type, blocksize, width=width)[0]
    theirs.bias.data = theirs.bias.data.to(dtype)
    ours.absmax = ours.absmax.float()
    x = inputs(64, width).to(dtype)
    with torch.no_grad():
        mine, other = ours(x), theirs(x)
        magnitude = (
            x.abs().float()
            @ dequantize_blockwise(ours.codes, ours.absmax, quant_type, blocksize).abs().T
        )
    # Both round a weight to the dtype (unit u each), sum in fp32 and round the output: |difference|
    # is at most (2u for weights + 2u for outputs + bias) of sum |x||w|, plus 2 n fp32 units for the
    # order of the sum.
    unit = {torch.float32: 2**-24, torch.bfloat16: 2**-9}[dtype]
    bound = magnitude * (4 * unit + 2 * width * 2**-24) + 2 * unit * ours.bias.abs().float()
    assert ((mine.float() - other.float()).abs() <= bound).all()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_quantization_is_nearest_neighbour(quant_type):
    """No other code of the codebook comes nearer to any weight."""
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    codes, absmax = quantize_blockwise(weight, quant_type, 64)
    error = (dequantize_blockwise(codes, absmax, quant_type, 64) - weight).abs()
    for code in range(16):
        other = dequantize_blockwise(torch.full_like(codes, code), absmax, quant_type, 64)
        assert ((other - weight).abs() >= error - 1e-6).all()


def test_a_block_of_zeros_stays_zero():
    codes, absmax = quantize_blockwise(torch.zeros(2, 64), "nf4", 64)
    assert torch.equal(dequantize_blockwise(codes, absmax, "nf4", 64), torch.zeros(2, 64))


@pytest.mark.parametrize(("backend", "quant_type", "blocksize"), BACKENDS)
def test_scales_are_fp32_live_and_linear(backend, quant_type, blocksize):
    model = network(backend, quant_type, blocksize)
    with torch.no_grad():
        model[0].bias.zero_()
    scales = find_scales(model)
    assert all(scales[name].dtype == torch.float32 for name in scales)
    assert scales.numel() == (128 * 128 + 8 * 128) // blocksize
    with torch.no_grad():
        before = model[0](inputs())
        scales["0"].mul_(2.0)
        assert torch.equal(model[0](inputs()), 2 * before)


@pytest.mark.parametrize("backend", ["reference", "bnb"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_stay_fp32_whatever_the_model_computes_in(backend, dtype):
    model = network(backend, dtype=dtype)
    assert {handle.scales.dtype for handle in handles_of(model)} == {torch.float32}
    assert model(inputs(dtype=dtype)).dtype == dtype


def test_eval_forwards_never_repack_a_layer():
    """Left alone, bitsandbytes replaces the scales by transposed bfloat16 ones on CPUs with
    AVX512-BF16.
    """
    model = network("bnb").eval()
    scales = find_scales(model)
    packed = [handle.codes.clone() for handle in handles_of(model)]
    with torch.no_grad():
        for _ in range(3):
            model(inputs())
    for handle, before in zip(handles_of(model), packed, strict=True):
        assert handle.scales is scales[handle.name]
        assert handle.scales.dtype == torch.float32
        assert torch.equal(handle.codes, before)


def test_a_repacked_layer_is_refused():
    model = network("bnb")
    model[0].weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ModelError, match=r"0 was repacked"):
        find_scales(model)


def test_double_quantization_is_unnested_without_changing_the_output():
    import bitsandbytes

    linear = nn.Linear(256, 64)
    layer = bitsandbytes.nn.Linear4bit(256, 64, compress_statistics=True, quant_type="nf4")
    layer.load_state_dict(linear.state_dict())
    layer = layer.to("cpu").eval()
    layer.support_avx512bf16_for_cpu = False
    assert layer.weight.quant_state.nested
    assert layer.weight.quant_state.absmax.dtype == torch.uint8
    with torch.no_grad():
        before = layer(inputs(width=256))
        bnb.prepare_(layer, "layer")
        after = layer(inputs(width=256))
    assert torch.equal(before, after)
    assert layer.weight.quant_state.absmax.dtype == torch.float32
    assert not layer.weight.quant_state.nested


def test_double_quantized_layers_can_be_made_from_linears():
    layer = bnb.quantize_linear(
        nn.Linear(256, 64), "nf4", 64, torch.device("cpu"), double_quant=True
    )
    assert layer.weight.quant_state.absmax.dtype == torch.float32


def test_a_deepcopy_is_tuned_through_its_own_state():
    model = network("bnb")
    twin = copy.deepcopy(model)
    scales = find_scales(twin)
    with torch.no_grad():
        plain = model(inputs())
        with scales.override(lambda names: {name: scales[name] * 2 for name in names}):
            shown = twin(inputs())
        assert not torch.equal(plain, shown)
        assert torch.equal(plain, model(inputs()))


@pytest.mark.parametrize("width", [48, 96, 160])
def test_rows_that_are_not_whole_blocks_are_left_unquantized(width):
    """bitsandbytes' CPU kernel gets them wrong by 13-30 %."""
    model = nn.Sequential(nn.Linear(width, 64), nn.Linear(64, 64))
    assert quantize_(model, blocksize=64) == 1
    assert type(model[0]) is nn.Linear


def test_rows_that_are_not_whole_blocks_are_refused_when_loaded_quantized():
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(96, 64, compress_statistics=False, quant_type="nf4").to(
        "cpu"
    )
    with pytest.raises(ModelError, match="96 inputs in blocks of 64"):
        find_scales(nn.Sequential(layer))


def test_layers_on_meta_are_refused():
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(64, 64, device="meta")
    with pytest.raises(ModelError, match="meta"):
        find_scales(nn.Sequential(layer))


def test_a_layer_that_was_never_moved_is_refused():
    import bitsandbytes

    with pytest.raises(ModelError, match="not quantized yet"):
        find_scales(nn.Sequential(bitsandbytes.nn.Linear4bit(64, 64)))


def test_nothing_to_quantize_is_an_error():
    with pytest.raises(ModelError, match="no linear layer"):
        quantize_(nn.Sequential(nn.Linear(48, 8)), blocksize=64)


def test_skip_list_matches_parts_of_names():
    assert is_skipped("proj_out", ["proj_out"])
    assert is_skipped("blocks.0.proj_out.linear", ["proj_out"])
    assert is_skipped("blocks.0.ff.net", ["blocks.0"])
    assert not is_skipped("blocks.10.ff", ["blocks.1"])
    assert not is_skipped("blocks.0.proj_outer", ["proj_out"])


def test_skipped_layers_stay_as_they_are():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    assert quantize_(model, skip=["1"]) == 1
    assert type(model[1]) is nn.Linear


@pytest.mark.parametrize("backend", ["reference", "bnb"])
def test_fingerprint_follows_codes_and_not_scales(backend):
    model = network(backend)
    before = codes_fingerprint(model)
    find_scales(model)["0"].mul_(1.1)
    assert codes_fingerprint(model) == before
    assert codes_fingerprint(network(backend, seed=5)) != before


def test_quantizing_a_transformers_model_needs_no_gpu():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    assert quantize_(model, skip=["lm_head"]) == 7
    with torch.no_grad():
        assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()
