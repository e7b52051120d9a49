"""The unquantized tensors of a model, for training beside the scales.

The QZO paper does so with AQLM models."""

from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from qzo_diffusion.core.weights import WeightHandle
from qzo_diffusion.quant.load import handles_of

Unquantized = Literal["none", "gains", "all"]


def unquantized_of(model: nn.Module, which: Unquantized) -> Sequence[WeightHandle]:
    """One handle for each tensor, under its parameter's name; "gains" are gains of norms and
    biases, all that has one dimension.
    """
    if which == "none":
        return ()
    quantized = {id(getattr(handle.module, "weight", None)) for handle in handles_of(model)}
    users: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(module)
    named: list[tuple[str, Any]] = [
        (name, one)
        for name, one in model.named_parameters()
        if one.is_floating_point()
        and id(one) not in quantized
        and (which == "all" or one.dim() == 1)
    ]
    return [WeightHandle(name, one, users[id(one)]) for name, one in named]
