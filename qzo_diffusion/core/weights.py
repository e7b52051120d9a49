"""A tensor that no quantizer touched, in the place of scales: norm gains, biases, embeddings, or
weights of a float model.

It is of either sign. In a 16-bit model it is kept in fp32 beside it, since most updates would round
to nothing there, and a forward sees it rounded, through a view; what the model itself holds is as
old as the last view that was closed."""

from collections.abc import Sequence

from torch import Tensor, nn


class WeightHandle:
    """Satisfies `core.scales.ScaleHandle`. `scales` is the tensor in fp32, shown in the dtype that
    the model has.

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
