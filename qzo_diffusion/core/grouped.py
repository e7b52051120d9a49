"""One trained number θ for a group of scales: all of a layer, all of a row (an output), or all of a column of blocks.

log s[o, g] = log s0[o, g] + layer + row[o] + column[g], with the axes that are asked for. A factor of a whole row is a factor of an
output and one of a block column a factor of inputs, so the weights need not be touched, and every example can have its own:

    y = exp(row) ∘ ((exp(column) ∘ x) Wᵀ) + bias                                 (separable scales: TuneQDM, arXiv 2401.04339)

All numbers of an axis are one tensor, over all layers: one draw, one update and one moment tensor instead of hundreds.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from qzo_diffusion.core.noise import Direction, SignCache, choose
from qzo_diffusion.core.parametrization import copy_by_name_
from qzo_diffusion.core.scales import Gains, LayerGain, ScaleSet, View

Axis = Literal["layer", "row", "column"]


class Grouped:
    """Numbers of one or several axes; `theta` holds them by axis, [n] in the order of the layers.

    Args:
        trained: names of the layers that take part; None is all.

    Raises:
        ValueError: blocks cross rows, so that rows have no scales of their own.
    """

    has_gains = True

    def __init__(self, scales: ScaleSet, axes: Sequence[Axis], trained: Sequence[str] | None = None) -> None:
        self.scales = scales
        self.theta: dict[str, Tensor] = {}
        self._of_layer: dict[str, dict[str, slice]] = {}
        self._signs = SignCache()
        names = list(scales if trained is None else trained)
        for axis in axes:
            ends = np.cumsum([0, *(_count(scales, name, axis) for name in names)]).tolist()
            self._of_layer[axis] = {name: slice(*ends[i : i + 2]) for i, name in enumerate(names)}
            self.theta[axis] = scales[names[0]].new_zeros(ends[-1])

    def numbers(self) -> dict[str, Tensor]:
        return self.theta

    def of_layer(self, axis: str, name: str) -> Tensor:
        """θ of one layer (a view): [1], [N] or [K / blocksize]."""
        return self.theta[axis][self._of_layer[axis][name]]

    def view(self, direction: Direction | None = None, radius: float = 0.0) -> View | None:
        def shown(names: Sequence[str]) -> dict[str, Tensor]:
            chosen = self._chosen(names)
            if not chosen:
                return {}
            factors = {axis: self._factors(axis, chosen, direction, radius) for axis in self.theta}
            return {name: self._spread(name, {axis: factors[axis][i] for axis in factors}) for i, name in enumerate(chosen)}

        return shown

    def gains(self, directions: Sequence[Direction], radii: Sequence[float]) -> Gains:
        def of_layers(names: Sequence[str]) -> dict[str, LayerGain]:
            chosen = self._chosen(names)
            if not chosen:
                return {}
            factors = {axis: self._factors_of_groups(axis, chosen, directions, radii) for axis in self.theta}
            return {name: self._gain({axis: factors[axis][i] for axis in factors}) for i, name in enumerate(chosen)}

        return of_layers

    @staticmethod
    def _gain(factors: dict[str, Tensor]) -> LayerGain:
        output = [factors[axis] for axis in ("layer", "row") if axis in factors]
        product = output[0] * output[1] if len(output) == 2 else output[0] if output else None
        return LayerGain(product, factors.get("column"))

    def _chosen(self, names: Sequence[str]) -> list[str]:
        taking_part = next(iter(self._of_layer.values()))
        return [name for name in names if name in taking_part]

    def _range(self, axis: str, chosen: Sequence[str]) -> tuple[int, int, list[int]]:
        """Where the numbers of neighbouring layers lie, and how many each has."""
        parts = [self._of_layer[axis][name] for name in chosen]
        return parts[0].start, parts[-1].stop, [part.stop - part.start for part in parts]

    def _factors(self, axis: str, chosen: Sequence[str], direction: Direction | None, radius: float) -> Sequence[Tensor]:
        """exp(θ + radius · z) of each layer."""
        start, stop, counts = self._range(axis, chosen)
        factor = torch.exp(self.theta[axis][start:stop])
        if direction is not None:
            factor = factor * self._probe(axis, [direction], radius, start, stop)[0]
        return factor.split(counts)

    def _factors_of_groups(
        self, axis: str, chosen: Sequence[str], directions: Sequence[Direction], radii: Sequence[float]
    ) -> Sequence[Tensor]:
        """exp(θ + radius · z) of each layer, [radii · directions, numbers]."""
        start, stop, counts = self._range(axis, chosen)
        probes = torch.cat([self._probe(axis, directions, radius, start, stop) for radius in radii])
        return (probes * torch.exp(self.theta[axis][start:stop])).split(counts, dim=1)

    def _probe(self, axis: str, directions: Sequence[Direction], radius: float, start: int, stop: int) -> Tensor:
        """exp(radius · z), [directions, stop - start]."""
        like = self.theta[axis]
        if directions[0].distribution == "gaussian":
            return torch.stack([direction.exp_z(axis, like, radius)[start:stop] for direction in directions])
        packed = np.stack([self._signs.packed(direction, axis, like.numel()) for direction in directions])
        return choose(packed, math.exp(radius), math.exp(-radius), like, start, stop)

    def _spread(self, name: str, factors: dict[str, Tensor]) -> Tensor:
        """The layer's scales times its factors; the blocks of a row lie side by side."""
        live = self.scales[name]
        grid = live.view(self.scales.rows(name), -1) if factors.keys() - {"layer"} else live
        for axis, factor in factors.items():
            grid = grid * (factor.unsqueeze(1) if axis == "row" else factor)
        return grid.view_as(live)

    def z(self, direction: Direction, name: str) -> Tensor:
        return direction.z(name, self.theta[name])

    def move_(self, directions: Sequence[Direction], amounts: Sequence[float]) -> None:
        for axis, theta in self.theta.items():
            for direction, amount in zip(directions, amounts, strict=True):
                theta.add_(self._term(axis, direction, amount))  # one by one: a sum over a tensor rounds by machine

    def _term(self, axis: str, direction: Direction, amount: float) -> Tensor:
        theta = self.theta[axis]
        if direction.distribution == "gaussian":
            return direction.z(axis, theta) * amount
        return choose(self._signs.packed(direction, axis, theta.numel()), amount, -amount, theta, 0, theta.numel())

    def add_(self, name: str, delta: Tensor) -> None:
        self.theta[name].add_(delta)

    def merge_(self) -> None:
        view = self.view()
        assert view is not None
        for chunk in self.scales.chunks():
            for name, merged in view(chunk).items():
                self.scales[name].copy_(merged)
        for theta in self.theta.values():
            theta.zero_()

    def state(self) -> dict[str, Tensor]:
        return self.theta

    def load_state_(self, state: dict[str, Tensor]) -> None:
        copy_by_name_(self.state(), state)


def _count(scales: ScaleSet, name: str, axis: Axis) -> int:
    rows, numel = scales.rows(name), scales[name].numel()
    if axis != "layer" and numel % rows:
        raise ValueError(f"{name}: blocks cross rows, so a row has no scales of its own")
    return {"layer": 1, "row": rows, "column": numel // rows}[axis]
