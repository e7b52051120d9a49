"""Evaluate losses at several probes in as few forward passes as memory allows.

Where θ scales activations, a batch is repeated and each copy has its own θ: the weights are read
and dequantized once for all probes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from qzo_diffusion.core.noise import Direction
from qzo_diffusion.core.parametrization import Parametrization

Batch = TypeVar("Batch")
Objective = Callable[[Batch], Tensor]
"""A micro-batch -> one loss per example, [B], or one per patch group of each example, [B, P], whose
mean is the example's loss. All randomness is in the micro-batch, so it can be evaluated again."""


def sample_losses(objective: Objective[Batch], micro_batch: Batch) -> list[float]:
    """One loss per example, or per patch group of each; no gradient is recorded."""
    with torch.no_grad():
        losses: list[float] = (
            objective(micro_batch).detach().reshape(-1).cpu().to(torch.float64).tolist()
        )
    return losses


def repeated(batch: Any, times: int) -> Any:
    """A batch of `times` copies of all examples, one copy after the other.

    None where the batch is no tensor and has no method `repeated`.
    """
    if isinstance(batch, Tensor):
        return torch.cat([batch] * times)
    return batch.repeated(times) if hasattr(batch, "repeated") else None


@dataclass(frozen=True)
class Probes(Generic[Batch]):
    """Probe a batch at every radius along every direction.

    Args:
        radii: with their sign, in the parametrization's units.
        probes_per_forward: the most probes in one forward pass; None is all of them.
    """

    objective: Objective[Batch]
    theta: Parametrization
    radii: tuple[float, ...]
    probes_per_forward: int | None = None

    def losses(
        self, batch: Batch, directions: Sequence[Sequence[Direction]]
    ) -> list[list[list[float]]]:
        """Losses [radius][direction][example].

        Args:
            directions: each entry is one direction that all examples share, or one for each
                example.
        """
        probes_per_forward = (
            len(directions) * len(self.radii)
            if self.probes_per_forward is None
            else self.probes_per_forward
        )
        if not self.theta.scales_activations or probes_per_forward == 1:
            return self._in_parts(batch, directions, 1, 1)
        found = self._in_parts(
            batch,
            directions,
            max(1, probes_per_forward // len(self.radii)),
            min(probes_per_forward, len(self.radii)),
        )
        return found or self._in_parts(batch, directions, 1, 1)

    def _in_parts(
        self,
        batch: Batch,
        directions: Sequence[Sequence[Direction]],
        directions_at_once: int,
        radii_at_once: int,
    ) -> list[list[list[float]]]:
        """Return `losses`, empty if the batch can't be repeated or has one loss for all copies."""
        found: list[list[list[float]]] = [[] for _ in self.radii]
        for start in range(0, len(directions), directions_at_once):
            part = directions[start : start + directions_at_once]
            for first in range(0, len(self.radii), radii_at_once):
                radii = self.radii[first : first + radii_at_once]
                losses = self._forward(batch, part, radii)
                if not losses:
                    return []
                for index in range(len(radii)):
                    found[first + index] += losses[index * len(part) : (index + 1) * len(part)]
        return found

    def _forward(
        self, batch: Batch, directions: Sequence[Sequence[Direction]], radii: Sequence[float]
    ) -> list[list[float]]:
        """One forward pass: losses [radius and direction][example]; empty as in `_in_parts`."""
        probes_per_forward = len(directions) * len(radii)
        copied = batch  # repeated below where there are several probes
        if probes_per_forward > 1:
            copied = repeated(batch, probes_per_forward)
            if copied is None:
                return []
        flat = [direction for of_copy in directions for direction in of_copy]
        with self.theta.scales.override(*self.theta.probes(flat, radii)):
            losses = sample_losses(self.objective, copied)
        if probes_per_forward > 1 and len(losses) != len(copied) * flat[0].patch_groups:  # type: ignore[arg-type]  # one loss for all
            return []
        size = len(losses) // probes_per_forward
        return [losses[i : i + size] for i in range(0, len(losses), size)]
