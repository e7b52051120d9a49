"""1x1 convolutions compute, load and are written as the linear layers that they are."""

import torch
from safetensors.torch import load_file
from torch import nn

from qzo_diffusion.diffusion.pointwise import (
    Pointwise,
    as_convolutions,
    as_linear,
    replace_convolutions_,
)
from qzo_diffusion.quant.load import handles_of
from qzo_diffusion.quant.stored import pending_dequantized, pending_tensors
from qzo_diffusion.quant.stream import Quantization, fill_
from qzo_diffusion.quant.weights import Pending, read_entries, write_tensors

CPU = torch.device("cpu")


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.shortcut = nn.Conv2d(64, 96, 1)
        self.other = nn.Conv2d(96, 8, 3, padding=1)

    def forward(self, x):
        return self.other(self.shortcut(x))


def made(device="cpu"):
    with torch.device(device):
        return Small().eval().requires_grad_(False)


def test_a_pointwise_layer_is_its_convolution():
    conv = nn.Conv2d(64, 96, 1)
    linear = nn.Linear(64, 96)
    linear.weight.data, linear.bias.data = conv.weight.data[:, :, 0, 0], conv.bias.data
    x = torch.randn(2, 64, 3, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(Pointwise(linear)(x), conv(x))


def test_files_of_convolutions_are_quantized_and_written_back(tmp_path):
    plain, file = made(), tmp_path / "model.safetensors"
    write_tensors(file, {name: Pending.of(one) for name, one in plain.state_dict().items()}, {})
    model = made("meta")
    replace_convolutions_(model)
    assert [n for n, m in model.named_modules() if isinstance(m, Pointwise)] == ["shortcut"]
    entries = as_linear(read_entries(file))
    fill_(model, entries, Quantization(), dtype=torch.float32, device=CPU)
    (handle,) = handles_of(model)
    assert handle.name == "shortcut.linear"
    x = torch.randn(2, 64, 4, 4, generator=torch.Generator().manual_seed(0))
    for tensors in (pending_tensors(model), pending_dequantized(model, torch.float32)):
        back = as_convolutions(model, tensors, torch.float32)
        assert {name: one.shape for name, one in back.items()} == {
            name: tuple(one.shape) for name, one in plain.state_dict().items()
        }
        again = tmp_path / "again.safetensors"
        write_tensors(again, back, {})
        loaded = made()
        loaded.load_state_dict(load_file(again))
        torch.testing.assert_close(loaded(x), model(x))
