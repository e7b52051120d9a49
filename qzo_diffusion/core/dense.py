"""Train every scale by itself, in place: there is no second copy of the scales.

The initial scales are in the base model's file. An update is one multiplication in place, by one of
two constants for Rademacher z."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from qzo_diffusion.core.bits import PackedBits, exp_pair, select
from qzo_diffusion.core.noise import Direction, bits_drawn
from qzo_diffusion.core.parametrization import copy_by_name_, exp, only_probe
from qzo_diffusion.core.scales import Override, ScaleSet
from qzo_diffusion.core.sign_cache import SignCache


class Dense:
    """Train every scale in relative units; `trained` names the layers, None is all."""

    scales_activations = False

    def __init__(self, scales: ScaleSet, trained: Sequence[str] | None = None) -> None:
        self.scales = scales
        self._trained = {name: scales[name] for name in (scales if trained is None else trained)}
        self._signs = SignCache()

    def templates(self) -> dict[str, Tensor]:
        return self._trained

    def perturbed(self, direction: Direction | None = None, radius: float = 0.0) -> Override | None:
        if direction is None:
            return None

        def override(names: Sequence[str]) -> dict[str, Tensor]:
            chosen = [name for name in names if name in self._trained]
            return (
                dict(zip(chosen, self._shifted(chosen, direction, radius), strict=True))
                if chosen
                else {}
            )

        return override

    def _live(self, names: Sequence[str]) -> list[Tensor]:
        return [self._trained[name] for name in names]

    def _shifted(
        self, names: Sequence[str], direction: Direction, radius: float
    ) -> Sequence[Tensor]:
        """The scales of several layers at radius · z, new tensors."""
        shifted = self._factors(names, direction, radius)
        torch._foreach_mul_(shifted, self._live(names))
        return shifted

    def _factors(self, names: Sequence[str], direction: Direction, radius: float) -> list[Tensor]:
        """exp(radius · z) of several layers, new tensors, drawn and selected together."""
        like = self._live(names)
        if direction.distribution != "rademacher":
            return [
                direction.exp_z(name, one, radius) for name, one in zip(names, like, strict=True)
            ]

        def drawn(of: Direction) -> PackedBits:
            return np.concatenate(
                [of.packed(name, one.numel()) for name, one in zip(names, like, strict=True)]
            )

        packed = self._signs.packed((direction,), tuple(names), drawn, like[0].device)
        chosen = select(packed, [exp_pair(radius)], like[0].dtype).flatten()
        parts = zip(chosen.split([bits_drawn(one.numel()) for one in like]), like, strict=True)
        return [
            part if part.shape == one.shape else part[: one.numel()].view_as(one)
            for part, one in parts
        ]

    def probes(
        self, directions: Sequence[Direction], radii: Sequence[float]
    ) -> tuple[Override | None, None]:
        return only_probe(self, directions, radii)

    def combined(
        self, name: str, directions: Sequence[Direction], amounts: Sequence[float]
    ) -> Tensor:
        total = torch.zeros_like(self.scales[name])
        for direction, amount in zip(directions, amounts, strict=True):
            total.add_(direction.z(name, total) * amount)
        return total

    def move_(self, directions: Sequence[Direction], amounts: Sequence[float]) -> None:
        for direction, amount in zip(directions, amounts, strict=True):
            for names in self.scales.chunks():
                if chosen := [name for name in names if name in self._trained]:
                    torch._foreach_mul_(
                        self._live(chosen), self._factors(chosen, direction, amount)
                    )

    def add_(self, name: str, delta: Tensor) -> None:
        self.scales[name].mul_(exp(delta))

    def merge_(self) -> None:
        """Nothing to do: the scales themselves are trained."""

    def state(self) -> dict[str, Tensor]:
        return self._trained

    def load_state_(self, state: dict[str, Tensor]) -> None:
        copy_by_name_(self.state(), state)
