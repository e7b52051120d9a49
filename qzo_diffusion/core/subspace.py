"""Directions from a subspace of θ: few numbers are estimated in place of many.

    z = c B      c of ±1 or Gaussian [k], B [k, n] the directions that span the subspace

The noise of an estimate grows with the numbers that are drawn, here k and not n. Its mean is BᵀB g
for the gradient g, so rates are not those of other parametrizations. Gradients of one style lie to
a large part in the span of those of others (docs/decisions/estimator.md D108). Random subspaces of
zeroth-order steps: SubZero, arXiv 2410.08989; here the subspace is given.

θ itself keeps all n numbers, so that a run may begin anywhere, and ends in its usual form."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qzo_diffusion.core.precision import where_float64_is

PART = 2**16  # numbers of θ that are moved at once


@dataclass(frozen=True)
class Subspace:
    """Args:
    directions: B [k, n] for the θ of one name, in its dtype and on its device.
    """

    directions: Tensor

    @property
    def count(self) -> int:
        return len(self.directions)

    def z(self, coefficients: Tensor, start: int, stop: int) -> Tensor:
        """Return z [groups, stop - start] for coefficients [groups, k]."""
        return coefficients @ self.directions[:, start:stop]

    def combined(self, coefficients: Tensor) -> Tensor:
        """Return Σ amounts · z [n] for the same sum of the coefficients, float64 [k].

        Sums are in float64 and rounded once. Machines may add in another order, so that a number
        can differ in its last bit between them.
        """
        like = self.directions
        parts = [coefficients @ where_float64_is(part).double() for part in like.split(PART, dim=1)]
        return torch.cat(parts).to(like.dtype).to(like.device)


def of_layers(given: Mapping[str, Tensor], rows: Mapping[str, int], like: Tensor) -> Subspace:
    """Return the subspace of the rows of some layers, in their order.

    Args:
        given: [k, rows] by layer, the same k everywhere.
        rows: of each layer.

    Raises:
        ValueError: a layer has no directions, or directions for another number of rows.
    """
    for name, count in rows.items():
        found = tuple(given[name].shape) if name in given else None
        if found is None or len(found) != 2 or found[1] != count:
            raise ValueError(f"{name}: directions {found} for {count} rows")
    counts = {len(given[name]) for name in rows}
    if len(counts) > 1:
        raise ValueError(f"layers have {sorted(counts)} directions")
    return Subspace(torch.cat([given[name].to(like.device, like.dtype) for name in rows], dim=1))
