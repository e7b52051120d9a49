"""Which numbers are trained, and how the quantization scales follow from them.

In relative units a trained number is θ = log(s / s0): eps and lr are then fractions of a scale, the same for every model and
back-end, and a scale stays positive. The absolute units of the paper are kept so that the two can be compared in one run.

| class         | numbers            | scale seen by the forward | update                    |
|---------------|--------------------|---------------------------|---------------------------|
| Dense         | one per scale      | s · exp(±ε z)             | s <- s · exp(δ)           |
| DenseAbsolute | one per scale      | s ± ε z                   | s <- max(s + δ, 0)        |
| PerLayer      | one θ per layer    | s · exp(θ ± ε z)          | θ <- θ + δ                |

A new level needs the methods of `Parametrization` and nothing else; estimator, optimizer and loop do not know which one runs.
Dense numbers live in the scales alone. Initial scales are not kept beside them: they are in the base model's file.
"""

import math
from typing import Literal, Protocol

import torch
from torch import Tensor

from qzo_diffusion.core.noise import Direction
from qzo_diffusion.core.scales import ScaleSet, View


class Parametrization(Protocol):
    scales: ScaleSet

    def numbers(self) -> dict[str, Tensor]:
        """A tensor per name with the shape, dtype and device of the trained numbers."""
        ...

    def view(self, direction: Direction | None = None, radius: float = 0.0) -> View | None:
        """The scales at (numbers + radius · z) for `ScaleSet.showing`; without a direction, at the numbers themselves."""
        ...

    def z(self, direction: Direction, name: str) -> Tensor:
        """z of one name's numbers."""
        ...

    def move_(self, direction: Direction, amount: float) -> None:
        """numbers += amount · z, z drawn again and never stored for more than one layer."""
        ...

    def add_(self, name: str, delta: Tensor) -> None:
        """numbers of `name` += delta."""
        ...

    def merge_(self) -> None:
        """Write everything into the live scales, so that the plain forward equals the viewed one."""
        ...

    def state(self) -> dict[str, Tensor]:
        """The trained numbers themselves (live, not copies), enough to continue from."""
        ...

    def load_state_(self, state: dict[str, Tensor]) -> None: ...


class Dense:
    """One number per scale, in relative units."""

    def __init__(self, scales: ScaleSet) -> None:
        self.scales = scales

    def numbers(self) -> dict[str, Tensor]:
        return self.scales.tensors()

    def view(self, direction: Direction | None = None, radius: float = 0.0) -> View | None:
        if direction is None:
            return None
        return lambda name, live: live * direction.exp_z(name, live, radius)

    def z(self, direction: Direction, name: str) -> Tensor:
        return direction.z(name, self.scales[name])

    def move_(self, direction: Direction, amount: float) -> None:
        for name in self.scales:
            live = self.scales[name]
            live.mul_(direction.exp_z(name, live, amount))

    def add_(self, name: str, delta: Tensor) -> None:
        self.scales[name].mul_(torch.exp(delta))

    def merge_(self) -> None:
        pass

    def state(self) -> dict[str, Tensor]:
        return self.scales.tensors()

    def load_state_(self, state: dict[str, Tensor]) -> None:
        _copy_by_name_(self.state(), state)


class DenseAbsolute(Dense):
    """One number per scale, in the paper's absolute units: additive, floored at zero (arXiv 2505.13430, algorithm 1)."""

    def view(self, direction: Direction | None = None, radius: float = 0.0) -> View | None:
        if direction is None:
            return None
        return lambda name, live: live + radius * direction.z(name, live)

    def move_(self, direction: Direction, amount: float) -> None:
        for name in self.scales:
            self.add_(name, amount * self.z(direction, name))

    def add_(self, name: str, delta: Tensor) -> None:
        self.scales[name].add_(delta).clamp_(min=0.0)


class PerLayer:
    """One number per quantized layer: all of its scales grow or shrink together."""

    def __init__(self, scales: ScaleSet) -> None:
        self.scales = scales
        self.theta = {name: torch.zeros((), dtype=scales[name].dtype) for name in scales}

    def numbers(self) -> dict[str, Tensor]:
        return self.theta

    def view(self, direction: Direction | None = None, radius: float = 0.0) -> View | None:
        factors = {}
        for name, theta in self.theta.items():
            moved = theta.item() + (radius * direction.scalar(name) if direction else 0.0)
            factors[name] = math.exp(moved)
        return lambda name, live: live * factors[name]

    def z(self, direction: Direction, name: str) -> Tensor:
        return torch.full_like(self.theta[name], direction.scalar(name))

    def move_(self, direction: Direction, amount: float) -> None:
        for name in self.theta:
            self.add_(name, amount * self.z(direction, name))

    def add_(self, name: str, delta: Tensor) -> None:
        self.theta[name].add_(delta)

    def merge_(self) -> None:
        for name, theta in self.theta.items():
            self.scales[name].mul_(math.exp(theta.item()))
            theta.zero_()

    def state(self) -> dict[str, Tensor]:
        return self.theta

    def load_state_(self, state: dict[str, Tensor]) -> None:
        _copy_by_name_(self.state(), state)


Level = Literal["dense", "layer"]
Units = Literal["relative", "absolute"]


def parametrize(scales: ScaleSet, level: Level, units: Units = "relative") -> Parametrization:
    """The parametrization by its name in a config.

    Raises:
        ValueError: absolute units are defined for dense numbers only.
    """
    if units == "absolute":
        if level != "dense":
            raise ValueError(f"absolute units need level 'dense', got {level!r}")
        return DenseAbsolute(scales)
    return Dense(scales) if level == "dense" else PerLayer(scales)


def _copy_by_name_(target: dict[str, Tensor], source: dict[str, Tensor]) -> None:
    if target.keys() != source.keys():
        raise ValueError(f"state of other layers: {sorted(target.keys() ^ source.keys())[:3]}")
    for name, tensor in target.items():
        tensor.copy_(source[name])
