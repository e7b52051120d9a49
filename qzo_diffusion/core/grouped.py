"""One trained number θ for a group of scales: all of a layer, all of a row (an output), or all of a
column of blocks.

log s[o, g] = log s0[o, g] + layer + row[o] + column[g], with the axes that are asked for. A factor
of a whole row is a factor of an output and one of a block column a factor of inputs, so the weights
need not be touched, and every example can have its own:

    y = exp(row) ∘ ((exp(column) ∘ x) Wᵀ) + bias    (separable scales: TuneQDM, arXiv 2401.04339)

So can every region of an example, a run of its tokens, in layers that treat tokens apart
("pointwise": feed-forward, queries, attention's output). What such a layer does to a region shows
almost only in that region's own loss, so one forward measures as many directions as there are
regions; what it does to other regions through later attention is left out. On `tiny` the gradient
that remains has a cosine of 0.97 with the whole one (docs/decisions/estimator.md D3).

All numbers of an axis are one tensor over all layers, those of pointwise layers another: one draw,
one update and one moment tensor instead of hundreds.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qzo_diffusion.core.activation_scaling import ActivationScaling, LayerScaling
from qzo_diffusion.core.bits import PackedBits, select, signed_sum
from qzo_diffusion.core.noise import Direction
from qzo_diffusion.core.parametrization import copy_by_name_, exp
from qzo_diffusion.core.scales import Override, ScaleSet
from qzo_diffusion.core.sign_cache import SignCache

Axis = Literal["layer", "row", "column"]


@dataclass(frozen=True)
class _Kind:
    """Numbers that lie in one tensor: where those of each layer are, and whether regions have a z
    of their own for them.
    """

    axis: Axis
    token_wise: bool
    of_layer: dict[str, slice]

    def chosen(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name in self.of_layer]

    def span(self, chosen: Sequence[str]) -> tuple[int, int, list[int]]:
        """Where the numbers of neighbouring layers lie, and how many each has."""
        parts = [self.of_layer[name] for name in chosen]
        return parts[0].start, parts[-1].stop, [part.stop - part.start for part in parts]


class _Probe(NamedTuple):
    """θ + radius · z for all radii and directions; all directions of the first radius come
    first.
    """

    directions: tuple[Direction, ...]
    radii: tuple[float, ...]

    def groups(self, token_wise: bool) -> int:
        """How many runs of tokens or of examples see numbers of their own."""
        return (
            len(self.radii)
            * len(self.directions)
            * (self.directions[0].patch_groups if token_wise else 1)
        )


class Grouped:
    """Numbers of one or several axes; `theta` holds them as "row" and "row.pointwise", [n] in the
    order of the layers.

    Args:
        trained: names of the layers that take part; None is all.
        pointwise: names of the layers whose numbers have a z for every region; with directions of
            one region it makes no difference but for which z is drawn.
        last_readers: names of the layers whose inputs nothing reads after them, so that factors may
            be written over them.

    Raises:
        ValueError: blocks cross rows, so that rows have no scales of their own.
    """

    scales_activations = True

    def __init__(
        self,
        scales: ScaleSet,
        axes: Sequence[Axis],
        trained: Sequence[str] | None = None,
        token_wise: Collection[str] = (),
        last_readers: Collection[str] = (),
    ) -> None:
        self.scales, self._last_readers = scales, frozenset(last_readers)
        self.theta: dict[str, Tensor] = {}
        self._kinds: dict[str, _Kind] = {}
        self._signs = SignCache()
        names = list(scales if trained is None else trained)
        # by whether they are pointwise
        self._numbers_of, self._scales_of = {False: 0, True: 0}, {False: 0, True: 0}
        for name in names:
            self._scales_of[name in token_wise] += scales[name].numel()
        for axis in axes:
            for is_token_wise in (False, True):
                members = [name for name in names if (name in token_wise) == is_token_wise]
                if members:
                    ends = np.cumsum(
                        [0, *(_count(scales, name, axis) for name in members)]
                    ).tolist()
                    key = f"{axis}.pointwise" if is_token_wise else axis
                    self._kinds[key] = _Kind(
                        axis,
                        is_token_wise,
                        {name: slice(*ends[i : i + 2]) for i, name in enumerate(members)},
                    )
                    self.theta[key] = scales[names[0]].new_zeros(ends[-1])
                    self._numbers_of[is_token_wise] += ends[-1]

    def templates(self) -> dict[str, Tensor]:
        return self.theta

    def layers(self, key: str) -> list[str]:
        """Names of the layers in the order of the numbers of `theta[key]`."""
        return list(self._kinds[key].of_layer)

    def axis(self, key: str) -> Axis:
        return self._kinds[key].axis

    def of_layer(self, axis: Axis, name: str) -> Tensor:
        """θ of one layer (a view): [1], [N] or [K / blocksize]."""
        (key,) = (
            key for key, kind in self._kinds.items() if kind.axis == axis and name in kind.of_layer
        )
        return self.theta[key][self._kinds[key].of_layer[name]]

    def perturbed(self, direction: Direction | None = None, radius: float = 0.0) -> Override | None:
        if direction is not None and direction.patch_groups != 1:
            raise ValueError(
                "an override has one direction for a whole forward, not "
                f"{direction.patch_groups} patch groups; use probes"
            )
        probe = None if direction is None else _Probe((direction,), (radius,))
        return self._override(dict.fromkeys(self._kinds, probe))

    def probes(
        self, directions: Sequence[Direction], radii: Sequence[float]
    ) -> tuple[Override | None, ActivationScaling | None]:
        """Numbers that are the same for all examples are shown as scales, the others as factors of
        inputs and outputs.

        θ itself goes with z where that makes for fewer numbers than the scales are.
        """
        probe = _Probe(tuple(directions), tuple(radii))
        alone: dict[str, _Probe | None] = {}
        gained: dict[str, bool] = {}  # by kind, whether its θ goes with its z
        for key, kind in self._kinds.items():
            groups = probe.groups(kind.token_wise)
            if groups == 1:
                alone[key] = probe
            else:
                gained[key] = (
                    groups * self._numbers_of[kind.token_wise] < self._scales_of[kind.token_wise]
                )
                if not gained[key]:
                    alone[key] = None
        return self._override(alone) if alone else None, self._scaling(
            probe, gained
        ) if gained else None

    def _override(self, probes: Mapping[str, "_Probe | None"]) -> Override:
        """Of some kinds of numbers, each at a probe of one group or where it is."""

        def shown(names: Sequence[str]) -> dict[str, Tensor]:
            factors: dict[str, dict[Axis, Tensor]] = {}
            for key, probe in probes.items():
                if chosen := self._kinds[key].chosen(names):
                    start, stop, _ = self._kinds[key].span(chosen)
                    theta = exp(self.theta[key][start:stop])
                    self._collect(
                        factors,
                        key,
                        chosen,
                        theta if probe is None else theta * self._exp_z(key, probe, start, stop)[0],
                    )
            return {name: self._expand(name, of_layer) for name, of_layer in factors.items()}

        return shown

    def _scaling(self, probe: "_Probe", kinds: Mapping[str, bool]) -> ActivationScaling:
        def of_layers(names: Sequence[str]) -> dict[str, LayerScaling]:
            factors: dict[str, dict[Axis, Tensor]] = {}
            for key, with_theta in kinds.items():
                if chosen := self._kinds[key].chosen(names):
                    start, stop, _ = self._kinds[key].span(chosen)
                    factor = self._exp_z(key, probe, start, stop)
                    if with_theta:
                        factor.mul_(exp(self.theta[key][start:stop]))
                    self._collect(factors, key, chosen, factor)
            return {
                name: self._layer_scaling(of_layer, name in self._last_readers)
                for name, of_layer in factors.items()
            }

        return of_layers

    def _collect(
        self, into: dict[str, dict[Axis, Tensor]], key: str, chosen: Sequence[str], factors: Tensor
    ) -> None:
        """Divide [..., numbers] of neighbouring layers among them."""
        kind = self._kinds[key]
        for name, factor in zip(chosen, factors.split(kind.span(chosen)[2], dim=-1), strict=True):
            into.setdefault(name, {})[kind.axis] = factor

    @staticmethod
    def _layer_scaling(factors: dict[Axis, Tensor], overwrites: bool) -> LayerScaling:
        output = [factors[axis] for axis in ("layer", "row") if axis in factors]
        product = output[0] * output[1] if len(output) == 2 else output[0] if output else None
        return LayerScaling(product, factors.get("column"), overwrites)

    def _exp_z(self, key: str, probe: "_Probe", start: int, stop: int) -> Tensor:
        """exp(radius · z), a new tensor [groups, stop - start]; groups are radii · directions ·
        regions where it is pointwise.
        """
        like, kind = self.theta[key], self._kinds[key]
        directions, radii = probe.directions, probe.radii
        if directions[0].distribution == "gaussian":
            drawn = [
                direction.exp_z(key, like, radius, each=kind.token_wise)
                for radius in radii
                for direction in directions
            ]
            return torch.stack(drawn).view(-1, like.numel())[:, start:stop]
        pairs = [(math.exp(radius), math.exp(-radius)) for radius in radii]
        return select(
            self._packed(key, directions, keep=True), pairs, like.dtype, start, stop
        ).flatten(0, 1)

    def _packed(self, key: str, directions: Sequence[Direction], keep: bool) -> Tensor:
        """The bits of the signs, [directions · regions, bytes]."""
        theta, each = self.theta[key], self._kinds[key].token_wise

        def drawn(direction: Direction) -> PackedBits:
            return direction.packed(key, theta.numel(), each)

        return self._signs.packed(directions, key, drawn, theta.device, keep).flatten(0, -2)

    def _expand(self, name: str, factors: dict[Axis, Tensor]) -> Tensor:
        """The layer's scales times its factors; the blocks of a row lie side by side."""
        live = self.scales[name]
        grid = live.view(self.scales.rows(name), -1) if factors.keys() - {"layer"} else live
        for axis, factor in factors.items():
            grid = grid * (factor.unsqueeze(1) if axis == "row" else factor)
        return grid.view_as(live)

    def combined(
        self, name: str, directions: Sequence[Direction], amounts: Sequence[float]
    ) -> Tensor:
        kind, theta = self._kinds[name], self.theta[name]
        if not kind.token_wise:
            amounts = _per_direction(directions, amounts)
        if directions[0].distribution == "rademacher":
            return signed_sum(
                self._packed(name, directions, keep=False), amounts, theta.numel()
            ).to(theta.dtype)
        drawn = (
            direction.z(name, theta, each=kind.token_wise).view(-1, theta.numel())
            for direction in directions
        )
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
        view = self.perturbed()
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
    patch_groups = directions[0].patch_groups
    return [
        math.fsum(amounts[i * patch_groups : (i + 1) * patch_groups])
        for i in range(len(directions))
    ]


def _count(scales: ScaleSet, name: str, axis: Axis) -> int:
    rows, numel = scales.rows(name), scales[name].numel()
    if axis != "layer" and numel % rows:
        raise ValueError(f"{name}: blocks cross rows, so a row has no scales of its own")
    return {"layer": 1, "row": rows, "column": numel // rows}[axis]
