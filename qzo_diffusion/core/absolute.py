"""The paper's absolute units, kept so that both can be compared in one run (arXiv 2505.13430, algorithm 1)."""

from collections.abc import Sequence

from torch import Tensor

from qzo_diffusion.core.dense import Dense
from qzo_diffusion.core.noise import Direction


class DenseAbsolute(Dense):
    """One number per scale: additive, floored at zero."""

    def _shifted(self, live: list[Tensor], names: Sequence[str], direction: Direction, radius: float) -> Sequence[Tensor]:
        return [one + radius * direction.z(name, one) for one, name in zip(live, names, strict=True)]

    def move_(self, directions: Sequence[Direction], amounts: Sequence[float]) -> None:
        for name in self._trained:
            for direction, amount in zip(directions, amounts, strict=True):
                self.add_(name, amount * direction.z(name, self.scales[name]))

    def add_(self, name: str, delta: Tensor) -> None:
        self.scales[name].add_(delta).clamp_(min=0.0)
