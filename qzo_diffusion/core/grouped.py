"""One trained number θ for a group of scales: all of a layer, all of a row (an output), or all of a column of blocks.

log s[o, g] = log s0[o, g] + layer + row[o] + column[g], with the axes that are asked for. A factor of a whole row is a factor of an
output and one of a block column a factor of inputs, so the weights need not be touched, and every example can have its own:

    y = exp(row) ∘ ((exp(column) ∘ x) Wᵀ) + bias                                 (separable scales: TuneQDM, arXiv 2401.04339)

So can every region of an example, a run of its tokens, in layers that treat tokens apart ("pointwise": feed-forward, queries,
attention's output). What such a layer does to a region shows almost only in that region's own loss, so one forward measures as many
directions as there are regions; what it does to other regions through later attention is left out. On `tiny` the gradient that
remains has a cosine of 0.97 with the whole one (docs/decisions.md).

All numbers of an axis are one tensor over all layers, those of pointwise layers another: one draw, one update and one moment tensor
instead of hundreds.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from qzo_diffusion.core.gains import Gains, LayerGain
from qzo_diffusion.core.noise import Direction, PackedBits, SignCache, choose, signed_sum
from qzo_diffusion.core.parametrization import copy_by_name_
from qzo_diffusion.core.scales import ScaleSet, View

Axis = Literal["layer", "row", "column"]


@dataclass(frozen=True)
class _Kind:
    """Numbers that lie in one tensor: where those of each layer are, and whether regions have a z of their own for them."""

    axis: Axis
    pointwise: bool
    of_layer: dict[str, slice]

    def chosen(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name in self.of_layer]

    def span(self, chosen: Sequence[str]) -> tuple[int, int, list[int]]:
        """Where the numbers of neighbouring layers lie, and how many each has."""
        parts = [self.of_layer[name] for name in chosen]
        return parts[0].start, parts[-1].stop, [part.stop - part.start for part in parts]


class Grouped:
    """Numbers of one or several axes; `theta` holds them as "row" and "row.pointwise", [n] in the order of the layers.

    Args:
        trained: names of the layers that take part; None is all.
        pointwise: names of the layers whose numbers have a z for every region; with directions of one region it makes no difference
            but for which z is drawn.

    Raises:
        ValueError: blocks cross rows, so that rows have no scales of their own.
    """

    has_gains = True

    def __init__(
        self, scales: ScaleSet, axes: Sequence[Axis], trained: Sequence[str] | None = None, pointwise: Collection[str] = ()
    ) -> None:
        self.scales = scales
        self.theta: dict[str, Tensor] = {}
        self._kinds: dict[str, _Kind] = {}
        self._signs = SignCache()
        names = list(scales if trained is None else trained)
        for axis in axes:
            for apart in (False, True):
                members = [name for name in names if (name in pointwise) == apart]
                if members:
                    ends = np.cumsum([0, *(_count(scales, name, axis) for name in members)]).tolist()
                    key = f"{axis}.pointwise" if apart else axis
                    self._kinds[key] = _Kind(axis, apart, {name: slice(*ends[i : i + 2]) for i, name in enumerate(members)})
                    self.theta[key] = scales[names[0]].new_zeros(ends[-1])

    def numbers(self) -> dict[str, Tensor]:
        return self.theta

    def layers(self, key: str) -> list[str]:
        """Names of the layers in the order of the numbers of `theta[key]`."""
        return list(self._kinds[key].of_layer)

    def axis(self, key: str) -> Axis:
        return self._kinds[key].axis

    def of_layer(self, axis: Axis, name: str) -> Tensor:
        """θ of one layer (a view): [1], [N] or [K / blocksize]."""
        (key,) = (key for key, kind in self._kinds.items() if kind.axis == axis and name in kind.of_layer)
        return self.theta[key][self._kinds[key].of_layer[name]]

    def view(self, direction: Direction | None = None, radius: float = 0.0) -> View | None:
        def shown(names: Sequence[str]) -> dict[str, Tensor]:
            factors: dict[str, dict[Axis, Tensor]] = {}
            for key, kind in self._kinds.items():
                if chosen := kind.chosen(names):
                    self._collect(factors, kind, chosen, self._factors(key, kind, chosen, direction, radius))
            return {name: self._spread(name, of_layer) for name, of_layer in factors.items()}

        return shown

    def gains(self, directions: Sequence[Direction], radii: Sequence[float]) -> Gains:
        def of_layers(names: Sequence[str]) -> dict[str, LayerGain]:
            factors: dict[str, dict[Axis, Tensor]] = {}
            for key, kind in self._kinds.items():
                if chosen := kind.chosen(names):
                    self._collect(factors, kind, chosen, self._factors_of_groups(key, kind, chosen, directions, radii))
            return {name: self._gain(of_layer) for name, of_layer in factors.items()}

        return of_layers

    @staticmethod
    def _collect(into: dict[str, dict[Axis, Tensor]], kind: _Kind, chosen: Sequence[str], factors: Sequence[Tensor]) -> None:
        for name, factor in zip(chosen, factors, strict=True):
            into.setdefault(name, {})[kind.axis] = factor

    @staticmethod
    def _gain(factors: dict[Axis, Tensor]) -> LayerGain:
        output = [factors[axis] for axis in ("layer", "row") if axis in factors]
        product = output[0] * output[1] if len(output) == 2 else output[0] if output else None
        return LayerGain(product, factors.get("column"))

    def _factors(
        self, key: str, kind: _Kind, chosen: Sequence[str], direction: Direction | None, radius: float
    ) -> Sequence[Tensor]:
        """exp(θ + radius · z) of each layer."""
        start, stop, counts = kind.span(chosen)
        factor = torch.exp(self.theta[key][start:stop])
        if direction is not None:
            _check_one_region(direction)
            factor = factor * self._probe(key, kind, [direction], [radius], start, stop)[0]
        return factor.split(counts)

    def _factors_of_groups(
        self, key: str, kind: _Kind, chosen: Sequence[str], directions: Sequence[Direction], radii: Sequence[float]
    ) -> Sequence[Tensor]:
        """exp(radius · z) of each layer, [radii · directions · regions, numbers], with one region where it is not pointwise."""
        start, stop, counts = kind.span(chosen)
        return self._probe(key, kind, directions, radii, start, stop).split(counts, dim=1)

    def _probe(
        self, key: str, kind: _Kind, directions: Sequence[Direction], radii: Sequence[float], start: int, stop: int
    ) -> Tensor:
        """exp(radius · z), [radii · directions · regions, stop - start]."""
        like = self.theta[key]
        if directions[0].distribution == "gaussian":
            drawn = [direction.exp_z(key, like, radius, each=kind.pointwise) for radius in radii for direction in directions]
            return torch.stack(drawn).view(-1, like.numel())[:, start:stop]
        pairs = [(math.exp(radius), math.exp(-radius)) for radius in radii]
        return choose(self._packed(key, kind, directions), pairs, like, start, stop).flatten(0, 1)

    def _packed(self, key: str, kind: _Kind, directions: Sequence[Direction]) -> PackedBits:
        """The bits of all signs, [directions · regions, bytes]."""
        numel = self.theta[key].numel()
        drawn = np.stack([self._signs.packed(direction, key, numel, kind.pointwise) for direction in directions])
        return drawn.reshape(-1, drawn.shape[-1])

    def _spread(self, name: str, factors: dict[Axis, Tensor]) -> Tensor:
        """The layer's scales times its factors; the blocks of a row lie side by side."""
        live = self.scales[name]
        grid = live.view(self.scales.rows(name), -1) if factors.keys() - {"layer"} else live
        for axis, factor in factors.items():
            grid = grid * (factor.unsqueeze(1) if axis == "row" else factor)
        return grid.view_as(live)

    def combined(self, name: str, directions: Sequence[Direction], amounts: Sequence[float]) -> Tensor:
        kind, theta = self._kinds[name], self.theta[name]
        if not kind.pointwise:
            amounts = _per_direction(directions, amounts)
        if directions[0].distribution == "rademacher":
            return signed_sum(self._packed(name, kind, directions), amounts, theta).to(theta.dtype)
        drawn = (direction.z(name, theta, each=kind.pointwise).view(-1, theta.numel()) for direction in directions)
        total = torch.zeros_like(theta)
        for z, amount in zip(chain.from_iterable(drawn), amounts, strict=True):
            total.add_(z * amount)  # one by one: a sum over a tensor rounds by machine
        return total

    def move_(self, directions: Sequence[Direction], amounts: Sequence[float]) -> None:
        for key, theta in self.theta.items():
            theta.add_(self.combined(key, directions, amounts))

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


def _per_direction(directions: Sequence[Direction], amounts: Sequence[float]) -> list[float]:
    """What its regions say together, for numbers that have one z for a whole example."""
    regions = directions[0].regions
    return [math.fsum(amounts[i * regions : (i + 1) * regions]) for i in range(len(directions))]


def _check_one_region(direction: Direction) -> None:
    if direction.regions != 1:
        raise ValueError(f"a view shows one direction to a whole forward, not {direction.regions} regions; use gains")


def _count(scales: ScaleSet, name: str, axis: Axis) -> int:
    rows, numel = scales.rows(name), scales[name].numel()
    if axis != "layer" and numel % rows:
        raise ValueError(f"{name}: blocks cross rows, so a row has no scales of its own")
    return {"layer": 1, "row": rows, "column": numel // rows}[axis]
