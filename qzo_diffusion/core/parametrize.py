"""Which numbers are trained, and how the quantization scales follow from them.

In relative units a trained number is θ = log(s / s0): eps and lr are then fractions of a scale, the same for every model and
back-end, and a scale stays positive. The absolute units of the paper are kept so that the two can be compared in one run.

| class         | numbers            | scale seen by the forward | update                    |
|---------------|--------------------|---------------------------|---------------------------|
| Dense         | one per scale      | s · exp(±ε z)             | s <- s · exp(δ)           |
| DenseAbsolute | one per scale      | s ± ε z                   | s <- max(s + δ, 0)        |
| Grouped       | one θ per row      | s · exp(θ ± ε z)          | θ <- θ + δ                |
| Grouped       | one θ per layer    | s · exp(θ ± ε z)          | θ <- θ + δ                |

A new level needs the methods of `Parametrization` and nothing else; estimator, optimizer and loop do not know which one runs.
Dense numbers live in the scales alone. Initial scales are not kept beside them: they are in the base model's file.
"""

import math
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from qzo_diffusion.core.noise import Direction
from qzo_diffusion.core.scales import SMALL_MODEL, Gain, ScaleSet, View


class Parametrization(Protocol):
    scales: ScaleSet

    def numbers(self) -> dict[str, Tensor]:
        """A tensor per name with the shape, dtype and device of the trained numbers."""
        ...

    def view(self, direction: Direction | None = None, radius: float = 0.0) -> View | None:
        """The scales at (numbers + radius · z) for `ScaleSet.showing`; without a direction, at the numbers themselves."""
        ...

    def gain(self, directions: Sequence[Direction], radius: float) -> Gain:
        """Directions of their own for every example, `directions[i]` for example i, as factors of outputs.

        Raises:
            ValueError: the numbers are finer than a row, so no factor of outputs can stand for them.
        """
        ...

    def z(self, direction: Direction, name: str) -> Tensor:
        """z of one name's numbers."""
        ...

    def move_(self, directions: Sequence[Direction], amounts: Sequence[float]) -> None:
        """numbers += Σ amounts[i] · z of directions[i], one after the other."""
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
    """One number per scale, in relative units. `trained` names the layers that take part; None is all."""

    def __init__(self, scales: ScaleSet, trained: Sequence[str] | None = None) -> None:
        self.scales = scales
        self._trained = {name: scales[name] for name in (scales if trained is None else trained)}
        self._drawn: tuple[Direction | None, dict[str, Tensor]] = (None, {})

    def numbers(self) -> dict[str, Tensor]:
        return self._trained

    def view(self, direction: Direction | None = None, radius: float = 0.0) -> View | None:
        if direction is None:
            return None

        factor = self._factors(direction, radius)

        def shown(name: str, live: Tensor) -> Tensor:
            return live * factor(name, live) if name in self._trained else live

        return self.scales.drawn_ahead(shown)

    def _factors(self, direction: Direction, radius: float) -> View:
        """(name, live) -> exp(radius · z)."""
        if direction.distribution == "gaussian":
            return lambda name, live: direction.exp_z(name, live, radius)
        like = next(iter(self._trained.values()))
        up, down = like.new_tensor(math.exp(radius)), like.new_tensor(math.exp(-radius))
        return lambda name, live: torch.where(self._bits(direction, name, live), up, down)

    def _bits(self, direction: Direction, name: str, live: Tensor) -> Tensor:
        """Drawn again whenever needed; a small model keeps them from +ε to the update."""
        if self.scales.numel() > SMALL_MODEL:
            return direction.bits(name, live)
        if self._drawn[0] != direction:
            self._drawn = (direction, {})
        known = self._drawn[1]
        if name not in known:
            known[name] = direction.bits(name, live)
        return known[name]

    def gain(self, directions: Sequence[Direction], radius: float) -> Gain:
        raise ValueError("dense numbers have no factor of outputs; probe rows or layers to give every example its own direction")

    def z(self, direction: Direction, name: str) -> Tensor:
        return direction.z(name, self.scales[name])

    def move_(self, directions: Sequence[Direction], amounts: Sequence[float]) -> None:
        for direction, amount in zip(directions, amounts, strict=True):
            factor = self._factors(direction, amount)
            for name, live in self._trained.items():
                live.mul_(factor(name, live))

    def add_(self, name: str, delta: Tensor) -> None:
        self.scales[name].mul_(torch.exp(delta))

    def merge_(self) -> None:
        pass

    def state(self) -> dict[str, Tensor]:
        return self._trained

    def load_state_(self, state: dict[str, Tensor]) -> None:
        _copy_by_name_(self.state(), state)


class DenseAbsolute(Dense):
    """One number per scale, in the paper's absolute units: additive, floored at zero (arXiv 2505.13430, algorithm 1)."""

    def view(self, direction: Direction | None = None, radius: float = 0.0) -> View | None:
        if direction is None:
            return None

        def shown(name: str, live: Tensor) -> Tensor:
            return live + radius * direction.z(name, live) if name in self._trained else live

        return self.scales.drawn_ahead(shown)

    def move_(self, directions: Sequence[Direction], amounts: Sequence[float]) -> None:
        for name in self._trained:
            for direction, amount in zip(directions, amounts, strict=True):
                self.add_(name, amount * self.z(direction, name))

    def add_(self, name: str, delta: Tensor) -> None:
        self.scales[name].add_(delta).clamp_(min=0.0)


class Grouped:
    """One number θ for a group of scales: all of a row of the weight [N, K] (an output), or all of a layer.

    Args:
        group: "row" or "layer".
        trained: names of the layers that take part; None is all.

    Raises:
        ValueError: blocks cross rows, so that rows have no scales of their own.
    """

    def __init__(self, scales: ScaleSet, group: Literal["row", "layer"], trained: Sequence[str] | None = None) -> None:
        self.scales = scales
        self.theta: dict[str, Tensor] = {}
        for name in scales if trained is None else trained:
            count = scales.rows(name) if group == "row" else 1
            if scales[name].numel() % count:
                raise ValueError(f"{name}: blocks cross rows, so a row has no scales of its own")
            self.theta[name] = scales[name].new_zeros(count)
        self._drawn: dict[str, tuple[tuple[Direction, ...], Tensor]] = {}

    def numbers(self) -> dict[str, Tensor]:
        return self.theta

    def view(self, direction: Direction | None = None, radius: float = 0.0) -> View | None:
        def shown(name: str, live: Tensor) -> Tensor:
            if name not in self.theta:
                return live
            factor = torch.exp(self.theta[name])
            if direction is not None:
                factor = factor * direction.exp_z(name, factor, radius)
            return _spread(live, factor)

        return self.scales.drawn_ahead(shown)

    def gain(self, directions: Sequence[Direction], radius: float) -> Gain:
        up, down = math.exp(radius), math.exp(-radius)

        def factors(name: str) -> Tensor | None:
            if name not in self.theta:
                return None
            like = self.theta[name]
            if directions[0].distribution == "gaussian":
                return torch.stack([direction.exp_z(name, like, radius) for direction in directions])
            return torch.where(self._bits(directions, name), like.new_tensor(up), like.new_tensor(down))

        if self.scales.numel() > SMALL_MODEL:
            return factors
        drawn = {name: factors(name) for name in self.theta}
        return drawn.get

    def _bits(self, directions: Sequence[Direction], name: str) -> Tensor:
        """bool [directions, numbers], kept until the next step: needed at +ε, at -ε and by the update, and there are few."""
        known = self._drawn.get(name)
        if known is None or known[0] != tuple(directions):
            drawn = torch.stack([direction.bits(name, self.theta[name]) for direction in directions])
            known = self._drawn[name] = (tuple(directions), drawn)
        return known[1]

    def z(self, direction: Direction, name: str) -> Tensor:
        return direction.z(name, self.theta[name])

    def move_(self, directions: Sequence[Direction], amounts: Sequence[float]) -> None:
        for name, theta in self.theta.items():
            if directions[0].distribution == "gaussian":
                terms = [self.z(direction, name) * amount for direction, amount in zip(directions, amounts, strict=True)]
            else:
                signs = self._bits(directions, name)
                up = torch.tensor(amounts, dtype=theta.dtype, device=theta.device).unsqueeze(1)
                terms = list(torch.where(signs, up, -up))
            for term in terms:  # one after the other: a sum over a tensor rounds differently from machine to machine
                theta.add_(term)

    def add_(self, name: str, delta: Tensor) -> None:
        self.theta[name].add_(delta)

    def merge_(self) -> None:
        for name, theta in self.theta.items():
            live = self.scales[name]
            live.copy_(_spread(live, torch.exp(theta)))
            theta.zero_()

    def state(self) -> dict[str, Tensor]:
        return self.theta

    def load_state_(self, state: dict[str, Tensor]) -> None:
        _copy_by_name_(self.state(), state)


Level = Literal["dense", "row", "layer"]
Units = Literal["relative", "absolute"]


def parametrize(scales: ScaleSet, level: Level, units: Units = "relative", trained: Sequence[str] | None = None) -> Parametrization:
    """The parametrization by its name in a config; `trained` names the layers that take part, None is all.

    Raises:
        ValueError: absolute units are defined for dense numbers only.
    """
    if units == "absolute":
        if level != "dense":
            raise ValueError(f"absolute units need level 'dense', got {level!r}")
        return DenseAbsolute(scales, trained)
    return Dense(scales, trained) if level == "dense" else Grouped(scales, level, trained)


def _spread(live: Tensor, factor: Tensor) -> Tensor:
    """A factor per group times every scale of the group; the blocks of a row lie side by side."""
    return (live.view(factor.numel(), -1) * factor.view(-1, 1)).view_as(live)


def _copy_by_name_(target: dict[str, Tensor], source: dict[str, Tensor]) -> None:
    if target.keys() != source.keys():
        raise ValueError(f"state of other layers: {sorted(target.keys() ^ source.keys())[:3]}")
    for name, tensor in target.items():
        tensor.copy_(source[name])
