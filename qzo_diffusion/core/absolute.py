"""The paper's absolute units, kept for comparison (arXiv 2505.13430, algorithm 1)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qzo_diffusion.core.dense import Dense
from qzo_diffusion.core.noise import Direction
from qzo_diffusion.core.scales import Override


class DenseAbsolute(Dense):
    """Train every scale by addition; none passes zero, from either side.

    Unquantized tensors (`ScaleSet.weights`) may change their sign.
    """

    def perturbed(self, direction: Direction | None = None, radius: float = 0.0) -> Override | None:
        weights = {name: one for name, one in self._trained.items() if name in self.scales.weights}
        if direction is None and weights:
            return lambda names: {name: weights[name] for name in names if name in weights}
        return super().perturbed(direction, radius)

    def _shifted(
        self, names: Sequence[str], direction: Direction, radius: float
    ) -> Sequence[Tensor]:
        return [
            one + radius * direction.z(name, one)
            for one, name in zip(self._live(names), names, strict=True)
        ]

    def move_(self, directions: Sequence[Direction], amounts: Sequence[float]) -> None:
        for name in self._trained:
            for direction, amount in zip(directions, amounts, strict=True):
                self.add_(name, amount * direction.z(name, self.scales[name]))

    def add_(self, name: str, delta: Tensor) -> None:
        live = self.scales[name]
        if name in self.scales.weights:
            live.add_(delta)
            return
        negative = live.signbit()  # true of -0.0 too: a scale that stopped at zero keeps its side
        moved = live + delta
        live.copy_(torch.where(negative, -(-moved).clamp(min=0.0), moved.clamp(min=0.0)))

    def merge_(self) -> None:
        """Write unquantized tensors into a 16-bit model; all else is in place."""
        self.scales.restore(self.scales.weights)
