"""Linear layers whose weight is an fp32 master copy, for training of the weights themselves.

The forward pass rounds the master to the dtype of its input, which may be bfloat16; updates of the
master then get lost in no rounding."""

from collections.abc import Callable, Iterable

import torch.nn.functional as F
from torch import Tensor, nn


class MasterLinear(nn.Module):
    """AdamW's layer: all of the weight is trained."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().float())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias)


def replace_linears_(
    model: nn.Module, names: Iterable[str], make: Callable[[nn.Linear], nn.Module]
) -> list[nn.Module]:
    """Put `make(linear)` in the place of each named linear; returns the new layers."""
    made = []
    for name in names:
        parent, _, child = name.rpartition(".")
        layer = make(model.get_submodule(name))  # type: ignore[arg-type]
        setattr(model.get_submodule(parent), child, layer)
        made.append(layer)
    return made
