"""SVDQuant (arXiv 2411.05007): a branch of low rank beside 4 bits, smoothing, rounded inputs."""

import pytest
import torch
from torch import nn

from qzo_diffusion.config.files import make_config
from qzo_diffusion.config.style import Config
from qzo_diffusion.core.errors import ConfigError
from qzo_diffusion.core.noise import Direction
from qzo_diffusion.core.parametrize import parametrize
from qzo_diffusion.quant.branched import hadamard_matrix, rotated, rounded
from qzo_diffusion.quant.choose import last_readers
from qzo_diffusion.quant.load import find_scales, plain_layer, quantize_
from qzo_diffusion.quant.stored import pending_dequantized
from qzo_diffusion.quant.stream import Quantization, fill_
from qzo_diffusion.quant.svdquant import RANK, input_peaks, quantized_layer
from qzo_diffusion.quant.weights import read_entries, write_tensors
from tests.quantized import assert_same, inputs, network, snapshot
from tests.small_models import sd3_inputs, sd3_transformer

CPU = torch.device("cpu")
LEVELS = ["dense", "row", "layer", "column", "separable"]


def spiky(outputs=128, width=256, seed=0):
    """A weight with a part of low rank, and inputs of which a few are 30 times as large."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator)

    weight = 0.02 * drawn(outputs, width) + 0.05 * drawn(outputs, 4) @ drawn(4, width)
    x = drawn(64, width)
    x[:, ::32] *= 30
    linear = nn.Linear(width, outputs)
    linear.weight.data, linear.bias.data = weight, drawn(outputs)
    return linear, x


def error(layer, linear, x):
    with torch.no_grad():
        wanted = linear(x)
        return ((layer(x) - wanted).norm() / wanted.norm()).item()


def test_the_branch_takes_what_four_bits_lose():
    linear, x = spiky()
    layer = plain_layer(linear, "svdquant", 64)
    assert layer.down.scales.shape == (RANK,)
    assert layer.residual.scales.shape == (128, 4)
    plain = plain_layer(linear, "nf4", 64)
    assert error(layer, linear, x) < error(plain, linear, x) / 2
    torch.testing.assert_close(
        layer(x), nn.functional.linear(x, layer.dequantized(), layer.bias), rtol=1e-4, atol=1e-4
    )


def test_smoothing_helps_where_inputs_are_rounded():
    linear, x = spiky()
    peaks = x.abs().amax(0)
    without = plain_layer(linear, "svdquant", 64, "int4")
    smoothed = plain_layer(linear, "svdquant", 64, "int4", peaks)
    assert error(smoothed, linear, x) < error(without, linear, x) / 2
    with torch.no_grad():
        four_bits = nn.functional.linear(rounded(x, 64), linear.weight, linear.bias)
    exact_weights = (four_bits - linear(x)).norm() / linear(x).norm()
    assert error(smoothed, linear, x) < exact_weights


def test_rounded_inputs_are_on_a_grid_of_their_run():
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    steps = rounded(x, 64).unflatten(-1, (2, 64)) / x.unflatten(-1, (2, 64)).abs().amax(
        -1, keepdim=True
    )
    whole = steps * 7
    torch.testing.assert_close(whole, whole.round(), atol=1e-4, rtol=0)
    assert not rounded(torch.zeros(2, 64), 64).any()


def test_gradients_pass_rounded_inputs_as_if_they_were_exact():
    linear, x = spiky()
    layer = plain_layer(linear, "svdquant", 64, "int4")
    x.requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantized().sum(0).expand_as(x))


def test_peaks_are_those_of_every_forward():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    x = torch.tensor([[1.0, -3.0, 0.0, 2.0]])
    found = input_peaks(model, ["0"], lambda: (model(x), model(-2 * x)))
    assert found["0"].tolist() == [2, 6, 0, 4]
    assert not model[0]._forward_pre_hooks


@pytest.mark.parametrize("size", [4, 8, 16, 32, 256])
def test_a_rotation_is_its_own_inverse(size):
    matrix = hadamard_matrix(size)
    torch.testing.assert_close(matrix @ matrix, torch.eye(size))
    assert torch.equal(matrix.abs(), torch.full_like(matrix, size**-0.5))
    x = torch.randn(2, 512)
    torch.testing.assert_close(rotated(rotated(x, size), size), x)


@pytest.mark.parametrize("level", LEVELS)
def test_every_parametrization_shows_what_it_merges(level):
    model = network("reference", "svdquant", 64)
    scales = find_scales(model)
    assert list(scales) == ["0.residual", "0.down", "2.residual", "2.down"]
    before, theta = snapshot(model, scales), parametrize(scales, level)
    for name, one in theta.templates().items():
        theta.add_(name, 0.05 * torch.randn(one.shape, generator=torch.Generator().manual_seed(1)))
    with torch.no_grad():
        with scales.override(theta.perturbed()):
            shown = model(inputs())
        if level != "dense":
            assert_same(before, snapshot(model, scales))
        theta.merge_()
        torch.testing.assert_close(model(inputs()), shown)


def test_probes_of_examples_are_those_of_merged_scales():
    """Factors of rows and columns scale the residual's inputs and outputs, not the branch's."""
    model = network("reference", "svdquant", 64, out=64)
    scales = find_scales(model)
    before = snapshot(model, scales)
    last = [name for name in scales if not name.endswith(".down")]
    theta = parametrize(scales, "separable", last_readers=last)
    directions = [Direction(0, step) for step in range(2)]
    x = inputs(2)
    override, scaling = theta.probes(directions, [0.1])
    with torch.no_grad():
        with scales.override(override, scaling):
            together = model(x.clone().unsqueeze(1))
        for index, direction in enumerate(directions):
            with scales.override(theta.perturbed(direction, 0.1)):
                alone = model(x[index : index + 1].unsqueeze(1))
            torch.testing.assert_close(together[index : index + 1], alone)
    assert_same(before, snapshot(model, scales))


def test_a_branch_is_no_last_reader():
    names = ["a.ff.net.2.residual", "a.ff.net.2.down", "mlp.down_proj"]
    assert last_readers(names) == ["a.ff.net.2.residual", "mlp.down_proj"]


def test_streamed_equals_quantized_whole_and_exports_as_one_weight(tmp_path):
    model = sd3_transformer(layers=1)
    model.save_pretrained(tmp_path)
    how = Quantization("svdquant", skip=("proj_out", "pos_embed"), backend="reference")
    with torch.device("meta"):
        streamed = type(model).from_config(model.config)
    filled = fill_(streamed, read_entries(tmp_path), how, dtype=torch.float32, device=CPU)
    assert filled.quantized
    whole = type(model).from_pretrained(tmp_path)
    quantize_(whole, quant_type="svdquant", skip=how.skip, backend="reference")
    one, other = streamed.state_dict(), whole.eval().state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    tensors = pending_dequantized(streamed, torch.float32)
    assert tensors.keys() == model.state_dict().keys()
    write_tensors(tmp_path / "diffusion_pytorch_model.safetensors", tensors, {})
    plain, x = type(model).from_pretrained(tmp_path).eval(), sd3_inputs(model)
    with torch.no_grad():
        torch.testing.assert_close(plain(**x).sample, streamed(**x).sample, rtol=1e-3, atol=1e-3)


def test_an_odd_number_of_rows_and_a_row_of_zeros_are_quantized():
    linear = nn.Linear(64, 3)
    linear.weight.data[1] = 0
    layer = quantized_layer(linear.weight, linear.bias, 64)
    assert layer.dequantized().isfinite().all()
    assert error(layer, linear, torch.randn(5, 64)) < 0.2


def test_settings_that_go_together():
    config = make_config({"quant": {"type": "svdquant", "activations": "int4"}}, Config)
    assert config.quant.backend == "reference"
    for wrong in (
        {"activations": "int4"},
        {"type": "int8", "backend": "intgrid", "activations": "int4"},
        {"type": "svdquant", "activations": "int8"},
    ):
        with pytest.raises(ConfigError, match="activations: float"):
            make_config({"quant": wrong}, Config)
