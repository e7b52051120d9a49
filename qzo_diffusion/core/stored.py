"""How factors of layers, rows and block columns reach the numbers that a layer stores."""

from collections.abc import Mapping
from typing import Literal, Protocol

from torch import Tensor

from qzo_diffusion.core.scales import ScaleSet

Axis = Literal["layer", "row", "column"]


class Stored(Protocol):
    """How the factors of rows and block columns reach the numbers that a layer stores.

    Attributes:
        rounds: whether a product is rounded, so that probes must not go through it.
    """

    rounds: bool

    def columns(self, name: str) -> int:
        """The number of block columns of a layer. Raises ValueError where blocks cross rows."""
        ...

    def times(self, name: str, factors: Mapping[Axis, Tensor]) -> Tensor:
        """The stored numbers times their factors [N], [columns] or [1], a new tensor."""
        ...


class ScaleBlocks:
    """Scales in blocks; the blocks of a row lie side by side."""

    rounds = False

    def __init__(self, scales: ScaleSet) -> None:
        self._scales = scales

    def columns(self, name: str) -> int:
        rows, numel = self._scales.rows(name), self._scales[name].numel()
        if numel % rows:
            raise ValueError(f"{name}: blocks cross rows, so a row has no scales of its own")
        return numel // rows

    def times(self, name: str, factors: Mapping[Axis, Tensor]) -> Tensor:
        live = self._scales[name]
        grid = live.view(self._scales.rows(name), -1) if factors.keys() - {"layer"} else live
        for axis, factor in factors.items():
            grid = grid * (factor.unsqueeze(1) if axis == "row" else factor)
        return grid.view_as(live)
