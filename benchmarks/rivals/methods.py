"""The rivals as step functions: each prepares the linears of a model, and returns its step."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.rivals.grass import GrassLinear
from benchmarks.rivals.lsq import LsqLinear
from benchmarks.rivals.masters import MasterLinear, replace_linears_
from benchmarks.rivals.wta_crs import WtaCrsLinear

Step = Callable[[Tensor, float], None]
"""A loss with its graph, and the rate."""
Method = Callable[[Any, Sequence[str], int], Step]
"""Model, names of its linears and a seed -> the step; the model is changed in place."""

# about as far as a step of fo-scales moves a weight; Grass changes few rows, and takes four times
# that
LR = {"lsq": 1e-4, "grass": 4e-4, "wta_crs": 1e-4, "adamw": 1e-4}


def adamw(model: Any, names: Sequence[str], seed: int) -> Step:
    return _by_adamw(replace_linears_(model, names, MasterLinear))


def lsq(model: Any, names: Sequence[str], seed: int) -> Step:
    return _by_adamw(replace_linears_(model, names, LsqLinear))


def wta_crs(model: Any, names: Sequence[str], seed: int) -> Step:
    generator = torch.Generator().manual_seed(seed)
    return _by_adamw(replace_linears_(model, names, lambda one: WtaCrsLinear(one, generator)))


def grass(model: Any, names: Sequence[str], seed: int) -> Step:
    layers = replace_linears_(model, names, GrassLinear)
    # the first layer's way back would not be taken for weights that need no gradient
    model.get_input_embeddings().register_forward_hook(_asks_for_a_slope)

    def step_(loss: Tensor, lr: float) -> None:
        loss.backward()
        for layer in layers:
            layer.step_(lr)  # type: ignore[operator]

    return step_


def _by_adamw(layers: Sequence[nn.Module]) -> Step:
    trained = [
        number for layer in layers for number in layer.parameters() if number.dtype == torch.float32
    ]
    for number in trained:
        number.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, fused=True)

    def step_(loss: Tensor, lr: float) -> None:
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()

    return step_


def _asks_for_a_slope(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.requires_grad_(torch.is_grad_enabled())


METHODS: dict[str, Method] = {"lsq": lsq, "grass": grass, "wta_crs": wta_crs, "adamw": adamw}
