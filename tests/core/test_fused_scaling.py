"""The kernel of a gain, by Triton's interpreter where there is no GPU; `benchmarks.gpu_check`
compares it on one.
"""

import importlib
import sys
import warnings

import pytest
import torch

from qzo_diffusion.core import activation_scaling

pytest.importorskip("triton", reason="Triton comes with torch for Linux alone")
NAME = "qzo_diffusion.core.fused_scaling"


@pytest.fixture
def scale(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read where a kernel is defined
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    yield importlib.import_module(NAME).scale
    sys.modules.pop(NAME, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("groups", "tokens", "width", "blocks"),
    [(1, 1, 8, 8), (3, 5, 192, 3), (2, 3, 1100, 1), (2, 3, 1100, 1100)],
)
def test_the_kernel_is_the_formula(scale, groups, tokens, width, blocks, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(groups, tokens, width, generator=generator).to(dtype)
    # a part of longer rows
    factor = (1 + torch.rand(groups, blocks + 2, generator=generator) / 10)[:, 1:-1]
    bias = torch.randn(width, generator=generator).to(dtype)
    expanded = factor.repeat_interleave(width // blocks, 1).unsqueeze(1)
    # One rounding to dtype, of a sum that is at most one rounding of fp32 off.
    close = {"rtol": torch.finfo(dtype).eps, "atol": 2 * torch.finfo(torch.float32).eps}
    alone = torch.empty_like(x)
    scale(x, factor, None, alone)
    torch.testing.assert_close(alone, (x.float() * expanded).to(dtype), **close)
    wanted = (x.float() * expanded + bias.float()).to(dtype)
    scale(x, factor, bias, x)  # into itself
    torch.testing.assert_close(x, wanted, **close)


def test_without_a_compiler_torch_does_the_same_and_it_is_said_once(monkeypatch):
    def broken(*_):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(importlib.import_module(NAME), "scale", broken)
    activation_scaling._fused.cache_clear()
    with pytest.warns(UserWarning, match="longer than they need to.*C compiler"):
        assert activation_scaling._fused(torch.device("cpu")) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert activation_scaling._fused(torch.device("cpu")) is None
    activation_scaling._fused.cache_clear()
