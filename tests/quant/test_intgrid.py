"""Codes on a grid: storage there and back, the nearest code, and forwards against the dequantized
weight.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.quant import intgrid
from qzo_diffusion.quant.intgrid import GRIDS, IntGridLinear, from_fp8, int8_product, quantize
from qzo_diffusion.quant.load import (
    find_codes,
    find_scales,
    frozen_fingerprint,
    handles_of,
    quantize_,
)
from qzo_diffusion.quant.stream import Quantization, fill_
from qzo_diffusion.quant.weights import read_entries
from tests.quant.test_stream import assert_same_model, empty, make
from tests.quantized import inputs, network

KINDS = ["int8", "int4", "fp8"]


def test_every_byte_of_fp8_is_what_torch_says():
    stored = torch.arange(256, dtype=torch.uint8)
    stored = stored[stored % 128 != 127]  # not a number
    expected = stored.view(torch.float8_e4m3fn).to(torch.float32)
    assert torch.equal(from_fp8(stored), expected)
    assert torch.equal(from_fp8(stored).signbit(), expected.signbit())


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_float32_whatever_the_default_dtype_is(kind):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # as transformers does while it loads
    try:
        codes = GRIDS[kind].codes(torch.zeros(2, 4, dtype=GRIDS[kind].dtype))
    finally:
        torch.set_default_dtype(before)
    assert codes.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_every_code_is_stored_and_comes_back_in_the_order_of_values(kind):
    grid = GRIDS[kind]
    codes = torch.arange(grid.low, grid.high + 1).float()
    codes = codes[: len(codes) // 2 * 2]
    assert torch.equal(grid.codes(grid.stored(codes)), codes)
    assert grid.stored(codes).numel() * grid.per_byte == codes.numel()
    values = grid.values(codes)
    assert (values.diff() > 0).all()
    assert values.isfinite().all()
    assert grid.values(torch.tensor([float(grid.high)])).item() == grid.largest


@pytest.mark.parametrize("kind", KINDS)
def test_each_weight_goes_to_its_nearest_code(kind):
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
    codes, scales = quantize(weight, kind, 32)
    layer = IntGridLinear(codes, scales, None, kind, "float")
    whole = layer.whole_numbers()
    grid = GRIDS[kind]
    errors = (layer.dequantized() - weight).abs()
    for step in (-1, 1):
        moved = (grid.codes(codes) + step).clamp(grid.low, grid.high)
        other = IntGridLinear(grid.stored(moved), scales, None, kind, "float")
        assert ((other.dequantized() - weight).abs() >= errors - 1e-6).all()
    assert whole.shape == weight.shape


def test_zeros_stay_zeros():
    for kind in KINDS:
        codes, scales = quantize(torch.zeros(2, 64), kind, 32)
        assert IntGridLinear(codes, scales, None, kind, "float").dequantized().abs().sum() == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 128), (2, 3, 128)])
def test_the_forward_is_the_dequantized_product(kind, dtype, shape):
    model = network("intgrid", kind, 32, dtype=dtype)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    layer = model[0]
    got, wanted = layer(x), F.linear(x.double(), layer.dequantized().double(), layer.bias.double())
    assert got.dtype == dtype
    assert got.shape == (*shape[:-1], 128)
    # a rounding of weights or of the product, and one of the output
    tolerance = 2e-6 if dtype == torch.float32 else 2**-7
    assert (got.double() - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize(("activations", "largest"), [("int8", 127), ("int4", 7)])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_rounded_inputs_are_off_by_half_a_step_of_their_token_at_most(kind, activations, largest):
    model = network("intgrid", kind, 32, out=128)
    quantized = nn.Module()
    quantized = network("intgrid", kind, 32, out=128)
    quantized[0].activations = activations
    x = inputs(20)
    steps = x.abs().amax(1, keepdim=True) / largest
    bound = (steps / 2) @ model[0].dequantized().abs().sum(1)[None]
    difference = (quantized[0](x) - model[0](x)).abs()
    assert (difference <= bound * 1.001 + 1e-5).all()
    assert difference.max() > (bound / 20).max()
    zeros = quantized[0](torch.zeros(3, 128))
    assert torch.allclose(zeros, model[0].bias.expand(3, -1))


def test_the_products_of_int8_are_exact():
    """Codes times rounded inputs are whole numbers; fp64 has room for all of them."""
    model = network("intgrid", "int8", 32)
    model[0].activations = "int8"
    x = inputs(8)
    unit = x.abs().amax(1, keepdim=True) / 127
    whole = (x / unit).round().double() @ model[0].codes.double().t()
    wanted = whole * unit.double() * (model[0].scales.double() / 127) + model[0].bias.double()
    assert torch.allclose(model[0](x).double(), wanted, rtol=1e-6, atol=1e-6)


def of_a_gpu(x, turned):
    """What CUDA's `torch._int_mm` takes."""
    rows, columns = x.shape
    assert rows > 16
    assert columns % 8 == 0 == turned.shape[1] % 8
    assert min(*x.shape, turned.shape[1]) > 0
    assert x.is_contiguous()
    return (x.double() @ turned.double()).to(torch.int32)


@pytest.mark.parametrize("rows", [1, 16, 17, 33])
@pytest.mark.parametrize(("columns", "outputs"), [(128, 8), (126, 8), (128, 5), (3, 1)])
def test_the_product_of_a_gpu_is_exact_for_every_shape(monkeypatch, rows, columns, outputs):
    monkeypatch.setattr(torch, "_int_mm", of_a_gpu)
    generator = torch.Generator().manual_seed(rows)
    x, codes = (
        torch.randint(-127, 128, (count, columns), generator=generator, dtype=torch.int8)
        for count in (rows, outputs)
    )
    found = intgrid._filled_up_product(x, codes)
    assert torch.equal(found.double(), x.double() @ codes.double().t())


def test_no_rows_give_no_rows():
    assert int8_product(
        torch.zeros(0, 16, dtype=torch.int8), torch.zeros(8, 16, dtype=torch.int8)
    ).shape == (0, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_scales_stay_fp32_and_can_be_tuned_too(kind):
    model = network("intgrid", kind, 32).to(torch.bfloat16)
    assert {handle.scales.dtype for handle in handles_of(model)} == {torch.float32}
    scales, before = find_scales(model), model(inputs(dtype=torch.bfloat16))
    scales["0"].mul_(1.5)
    assert not torch.equal(model(inputs(dtype=torch.bfloat16)), before)


def test_what_is_frozen_is_told_by_its_hash():
    model = network("intgrid", "int8")
    scales, (codes, _) = find_scales(model), find_codes(model)
    of_scales, of_codes = frozen_fingerprint(model, scales), frozen_fingerprint(model, codes)
    codes["0"][0, 0] ^= 1
    assert frozen_fingerprint(model, codes) == of_codes
    assert frozen_fingerprint(model, scales) != of_scales


def test_other_formats_have_no_codes_to_train():
    with pytest.raises(ModelError, match="intgrid"):
        find_codes(network("bnb"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_kind", ["medium", "qwen2_tied"])
def test_streaming_gives_what_quantizing_the_whole_model_gives(kind, model_kind, tmp_path):
    model = make(model_kind)
    model.save_pretrained(tmp_path)
    filled = empty(model)
    how = Quantization(kind, 32, ("proj_out", "lm_head", "pos_embed"), "intgrid", "int8")
    fill_(filled, read_entries(tmp_path), how, dtype=torch.float32, device=torch.device("cpu"))
    quantize_(
        model, quant_type=kind, blocksize=32, skip=how.skip, backend="intgrid", activations="int8"
    )
    assert_same_model(model.eval(), filled)
    assert all(
        module.activations == "int8"
        for module in filled.modules()
        if isinstance(module, IntGridLinear)
    )
