"""One θ for a group of scales: for a layer, a row (one output) or a column of blocks.

    log s[o, g] = log s0[o, g] + layer + row[o] + column[g]      with the axes that are asked for

A factor of a whole row scales an output, and a factor of a block column scales inputs. So no weight
needs to change, and each example of a batch can have its own θ:

    y = exp(row) ∘ ((exp(column) ∘ x) Wᵀ) + bias    (separable scales: TuneQDM, arXiv 2401.04339)

The same factors train integer codes, which then are rounded to their grid (`core.rounded_codes`).

In token-wise layers (feed-forward, queries, attention's output) each patch group of an example, a
run of its tokens, can have its own θ as well. Such a layer changes almost only the loss of that
patch group, so one forward pass measures as many directions as there are patch groups. Effects on
other patch groups through later attention are left out: on `tiny` the remaining gradient has a
cosine of 0.97 with the whole one (docs/decisions/estimator.md D3).

All θ of an axis are one tensor over all layers, those of token-wise layers another. That makes one
draw, one update and one moment tensor instead of hundreds.
"""

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qzo_diffusion.core.activation_scaling import ActivationScaling, LayerScaling
from qzo_diffusion.core.bits import PackedBits, exp_pair, select, signed_sum
from qzo_diffusion.core.noise import Direction
from qzo_diffusion.core.parametrization import copy_by_name_, exp
from qzo_diffusion.core.precision import where_float64_is
from qzo_diffusion.core.scales import Override, ScaleSet
from qzo_diffusion.core.sign_cache import SignCache
from qzo_diffusion.core.stored import Axis, ScaleBlocks, Stored
from qzo_diffusion.core.subspace import Subspace, of_layers


@dataclass(frozen=True)
class _Kind:
    """One tensor of θ: its axis, whether patch groups have their own z, and where layers lie."""

    axis: Axis
    token_wise: bool
    of_layer: dict[str, slice]

    def chosen(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name in self.of_layer]

    def span(self, chosen: Sequence[str]) -> tuple[int, int, list[int]]:
        """Start and end of neighbouring layers in the tensor, and how many θ each has."""
        parts = [self.of_layer[name] for name in chosen]
        return parts[0].start, parts[-1].stop, [part.stop - part.start for part in parts]


class _Probe(NamedTuple):
    """θ + radius · z for all radii and directions: all directions of the first radius, then the
    next.
    """

    directions: tuple[Direction, ...]
    radii: tuple[float, ...]

    def groups(self, token_wise: bool) -> int:
        """The number of θ in one forward: radii · directions, times patch groups if token-wise."""
        return (
            len(self.radii)
            * len(self.directions)
            * (self.directions[0].patch_groups if token_wise else 1)
        )


class Grouped:
    """Trains θ, the logs of the factors that multiply scales by layer, row or block column.

    `by_axis` holds θ: "row", and "row.pointwise" for token-wise layers, each [n] in the order of
    the layers.

    Args:
        trained: names of the layers that take part; None is all.
        token_wise: names of the layers whose θ have a z for each patch group. With one patch group
            only another z is drawn.
        last_readers: names of the layers whose inputs nothing reads afterwards, so that they may be
            overwritten.
        stored: what the factors multiply; None is the scales themselves.
        subspace: directions of the rows [k, rows] by layer, for axes of rows alone; None draws
            every number.

    Raises:
        ValueError: blocks cross rows, so that rows have no scales of their own; or a subspace of
            other axes or other layers.
    """

    scales_activations = True

    def __init__(
        self,
        scales: ScaleSet,
        axes: Sequence[Axis],
        trained: Sequence[str] | None = None,
        token_wise: Collection[str] = (),
        last_readers: Collection[str] = (),
        stored: Stored | None = None,
        subspace: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.scales, self._last_readers = scales, frozenset(last_readers)
        self._stored = ScaleBlocks(scales) if stored is None else stored
        self.by_axis: dict[str, Tensor] = {}
        self._kinds: dict[str, _Kind] = {}
        self._signs = SignCache()
        names = list(scales if trained is None else trained)
        # by whether they are token-wise
        self._numbers_of, self._scales_of = {False: 0, True: 0}, {False: 0, True: 0}
        for name in names:
            self._scales_of[name in token_wise] += scales[name].numel()
        for axis in axes:
            for is_token_wise in (False, True):
                members = [name for name in names if (name in token_wise) == is_token_wise]
                if members:
                    ends = np.cumsum([0, *(self._count(name, axis) for name in members)]).tolist()
                    key = f"{axis}.pointwise" if is_token_wise else axis
                    self._kinds[key] = _Kind(
                        axis,
                        is_token_wise,
                        {name: slice(*ends[i : i + 2]) for i, name in enumerate(members)},
                    )
                    self.by_axis[key] = _zeros(scales[names[0]], ends[-1])
                    self._numbers_of[is_token_wise] += ends[-1]
        if subspace is not None and tuple(axes) != ("row",):
            raise ValueError(f"a subspace of rows for {' and '.join(axes)}")
        self._subspaces: dict[str, Subspace] = {}
        for key, theta in self.by_axis.items() if subspace is not None else ():
            rows = {name: scales.rows(name) for name in self.layers(key)}
            self._subspaces[key] = of_layers(subspace or {}, rows, theta)

    @property
    def rounds(self) -> bool:
        """Whether the stored numbers times their factors are rounded, as integer codes are."""
        return self._stored.rounds

    @property
    def in_subspace(self) -> bool:
        """Whether z is drawn from a subspace; θ itself may lie outside it."""
        return bool(self._subspaces)

    def templates(self) -> dict[str, Tensor]:
        return self.by_axis

    def layers(self, key: str) -> list[str]:
        """Names of the layers in the order of `by_axis[key]`."""
        return list(self._kinds[key].of_layer)

    def axis(self, key: str) -> Axis:
        return self._kinds[key].axis

    def is_token_wise(self, key: str) -> bool:
        """Whether each patch group has its own z for `by_axis[key]`."""
        return self._kinds[key].token_wise

    def place(self, key: str, name: str) -> slice:
        """Return the slice of `by_axis[key]` that holds the θ of a layer."""
        return self._kinds[key].of_layer[name]

    def of_layer(self, axis: Axis, name: str) -> Tensor:
        """θ of one layer (a view): [1], [N] or [K / blocksize]."""
        (key,) = (
            key for key, kind in self._kinds.items() if kind.axis == axis and name in kind.of_layer
        )
        return self.by_axis[key][self._kinds[key].of_layer[name]]

    def perturbed(self, direction: Direction | None = None, radius: float = 0.0) -> Override | None:
        if direction is not None and direction.patch_groups != 1:
            raise ValueError(
                "an override has one direction for a whole forward, not "
                f"{direction.patch_groups} patch groups; use probes"
            )
        probe = None if direction is None else _Probe((direction,), (radius,))
        return self._override(dict.fromkeys(self._kinds, probe))

    def shifted(self, vectors: Mapping[str, Tensor]) -> Override:
        """The scales at θ + vectors, which have the names and shapes of `by_axis`."""
        other = copy.copy(self)
        other.by_axis = {key: theta + vectors[key] for key, theta in self.by_axis.items()}
        return other._override(dict.fromkeys(self._kinds))

    def probes(
        self, directions: Sequence[Direction], radii: Sequence[float]
    ) -> tuple[Override | None, ActivationScaling | None]:
        """The override of scales and the activation scaling that show all probes to one forward.

        θ itself scales activations too where that takes fewer factors than there are scales, or
        where it would be rounded.
        """
        probe = _Probe(tuple(directions), tuple(radii))
        in_scales: dict[str, _Probe | None] = {}
        in_activations: dict[str, bool] = {}  # whether θ goes with z
        for key, kind in self._kinds.items():
            groups = probe.groups(kind.token_wise)
            if groups == 1 and not self.rounds:
                in_scales[key] = probe
            else:
                in_activations[key] = self.rounds or (
                    groups * self._numbers_of[kind.token_wise] < self._scales_of[kind.token_wise]
                )
                if not in_activations[key]:
                    in_scales[key] = None
        return self._override(in_scales) if in_scales else None, self._scaling(
            probe, in_activations
        ) if in_activations else None

    def _override(self, probes: Mapping[str, "_Probe | None"]) -> Override:
        """Scales at θ, or at θ + radius · z where a tensor has a probe (of one group)."""

        def override(names: Sequence[str]) -> dict[str, Tensor]:
            factors: dict[str, dict[Axis, Tensor]] = {}
            for key, probe in probes.items():
                if chosen := self._kinds[key].chosen(names):
                    start, stop, _ = self._kinds[key].span(chosen)
                    theta = exp(self.by_axis[key][start:stop])
                    self._collect(
                        factors,
                        key,
                        chosen,
                        theta if probe is None else theta * self._exp_z(key, probe, start, stop)[0],
                    )
            return {name: self._stored.times(name, one) for name, one in factors.items()}

        return override

    def _scaling(self, probe: "_Probe", kinds: Mapping[str, bool]) -> ActivationScaling:
        def of_layers(names: Sequence[str]) -> dict[str, LayerScaling]:
            factors: dict[str, dict[Axis, Tensor]] = {}
            for key, with_theta in kinds.items():
                if chosen := self._kinds[key].chosen(names):
                    start, stop, _ = self._kinds[key].span(chosen)
                    factor = self._exp_z(key, probe, start, stop)
                    if with_theta:
                        factor.mul_(exp(self.by_axis[key][start:stop]))
                    self._collect(factors, key, chosen, factor)
            examples = probe.groups(token_wise=False)
            return {
                name: self._layer_scaling(of_layer, name in self._last_readers, examples)
                for name, of_layer in factors.items()
            }

        return of_layers

    def _collect(
        self, into: dict[str, dict[Axis, Tensor]], key: str, chosen: Sequence[str], factors: Tensor
    ) -> None:
        """Split the factors [..., n] of neighbouring layers by layer and axis."""
        kind = self._kinds[key]
        for name, factor in zip(chosen, factors.split(kind.span(chosen)[2], dim=-1), strict=True):
            into.setdefault(name, {})[kind.axis] = factor

    @staticmethod
    def _layer_scaling(
        factors: dict[Axis, Tensor], overwrites: bool, examples: int
    ) -> LayerScaling:
        output = [factors[axis] for axis in ("layer", "row") if axis in factors]
        product = output[0] * output[1] if len(output) == 2 else output[0] if output else None
        patch_groups = len(next(iter(factors.values()))) // examples
        return LayerScaling(product, factors.get("column"), overwrites, patch_groups)

    def _exp_z(self, key: str, probe: "_Probe", start: int, stop: int) -> Tensor:
        """exp(radius · z), a new tensor [groups, stop - start].

        groups = radii · directions, times patch groups where the layers are token-wise.
        """
        like, kind = self.by_axis[key], self._kinds[key]
        directions, radii = probe.directions, probe.radii
        if key in self._subspaces:
            z = self._subspaces[key].z(self._coefficients(key, directions), start, stop)
            return torch.cat([torch.exp(radius * z) for radius in radii])
        if directions[0].distribution != "rademacher":
            drawn = [
                direction.exp_z(key, like, radius, each=kind.token_wise)
                for radius in radii
                for direction in directions
            ]
            return torch.stack(drawn).view(-1, like.numel())[:, start:stop]
        pairs = [exp_pair(radius) for radius in radii]
        return select(
            self._packed(key, directions, keep=True), pairs, like.dtype, start, stop
        ).flatten(0, 1)

    def _coefficients(self, key: str, directions: Sequence[Direction]) -> Tensor:
        """Coefficients [groups, k] of the directions of a subspace, for one radius."""
        like, each = self._template(key), self._kinds[key].token_wise
        if directions[0].distribution != "rademacher":
            return torch.cat([one.z(key, like, each).view(-1, len(like)) for one in directions])
        packed = self._packed(key, directions, keep=True)
        return select(packed, [(1.0, -1.0)], like.dtype, 0, len(like))[0]

    def _template(self, key: str) -> Tensor:
        """A tensor whose shape, dtype and device a draw takes: θ itself [n], or zeros [k] for the
        coefficients in a subspace.
        """
        theta, subspace = self.by_axis[key], self._subspaces.get(key)
        return theta if subspace is None else theta.new_zeros(subspace.count)

    def _packed(self, key: str, directions: Sequence[Direction], keep: bool) -> Tensor:
        """The packed signs of θ, or of its coefficients in a subspace: [directions, bytes], times
        patch groups if token-wise. `keep` them for the next call.
        """
        theta, each = self._template(key), self._kinds[key].token_wise

        def drawn(direction: Direction) -> PackedBits:
            return direction.packed(key, theta.numel(), each)

        return self._signs.packed(directions, key, drawn, theta.device, keep).flatten(0, -2)

    def _count(self, name: str, axis: Axis) -> int:
        columns = 1 if axis == "layer" else self._stored.columns(name)
        return self.scales.rows(name) if axis == "row" else columns

    def combined(
        self, name: str, directions: Sequence[Direction], amounts: Sequence[float]
    ) -> Tensor:
        kind, like, subspace = self._kinds[name], self._template(name), self._subspaces.get(name)
        if not kind.token_wise:
            amounts = _per_direction(directions, amounts)
        if directions[0].distribution == "rademacher":
            exact = signed_sum(self._packed(name, directions, keep=False), amounts, like.numel())
            if subspace is not None:
                return subspace.combined(exact)
            return exact.to(like.dtype).to(like.device)
        drawn = (
            direction.z(name, like, each=kind.token_wise).view(-1, like.numel())
            for direction in directions
        )
        total = torch.zeros_like(like)
        for z, amount in zip(chain.from_iterable(drawn), amounts, strict=True):
            total.add_(z * amount)  # one by one: a sum over a tensor rounds by machine
        return total if subspace is None else subspace.combined(where_float64_is(total).double())

    def move_(self, directions: Sequence[Direction], amounts: Sequence[float]) -> None:
        for key, theta in self.by_axis.items():
            theta.add_(self.combined(key, directions, amounts))

    def add_(self, name: str, delta: Tensor) -> None:
        self.by_axis[name].add_(delta)

    def merge_(self) -> None:
        """Multiply the factors into the live scales, and set θ to zero."""
        override = self.perturbed()
        assert override is not None
        for chunk in self.scales.chunks():
            for name, merged in override(chunk).items():
                self.scales[name].copy_(merged)
        for theta in self.by_axis.values():
            theta.zero_()

    def state(self) -> dict[str, Tensor]:
        return self.by_axis

    def load_state_(self, state: dict[str, Tensor]) -> None:
        copy_by_name_(self.state(), state)


def _per_direction(directions: Sequence[Direction], amounts: Sequence[float]) -> list[float]:
    """Sum the amounts over patch groups, for θ that have one z for a whole example."""
    patch_groups = directions[0].patch_groups
    return [
        math.fsum(amounts[i * patch_groups : (i + 1) * patch_groups])
        for i in range(len(directions))
    ]


def _zeros(like: Tensor, count: int) -> Tensor:
    """θ for scales of this dtype; of integer codes in fp32."""
    dtype = like.dtype if like.is_floating_point() else torch.float32
    return torch.zeros(count, dtype=dtype, device=like.device)
