"""Train an unquantized tensor in the place of scales: norm weights, biases, embeddings, or weights
of a float model.

It may be negative. For a 16-bit model an fp32 copy is kept beside it, since most updates would
round to nothing there. A forward pass uses the copy, rounded, by an override; outside of one the
model holds the value of the last override."""

from collections.abc import Sequence

from torch import Tensor, nn


class WeightHandle:
    """A `core.scales.ScaleHandle` of one tensor: `scales` is its fp32 copy.

    Args:
        modules: all that use the parameter; an embedding is often the output head too.
    """

    def __init__(self, name: str, parameter: Tensor, modules: Sequence[nn.Module]) -> None:
        self.name, self.modules, self._parameter = name, tuple(modules), parameter
        self.scales, self._dtype = parameter.detach().float(), parameter.dtype

    @property
    def module(self) -> nn.Module:
        return self.modules[0]

    def override(self, scales: Tensor) -> None:
        self._parameter.data = scales.to(self._dtype)
