"""The directions that span the ways of several styles, longer the more of the ways they hold.

A way has, for each name of θ and each layer, gradients [steps, rows] and places [m, rows]. Layers
are read one at a time, so that memory is that of the result and of one layer.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

GRADIENTS, PLACES = "gradients", "places"
WEIGHT = 3.0  # of a place over that of a gradient


def spanned(ways: Sequence[Path], count: int) -> dict[str, Tensor]:
    """Return directions [k, rows] fp16 by layer; z = c B has the mean square 1, as signs have.

    B = (U w)ᵀ H for the rows H of gradients and places, their weights w, and the eigenvectors U of
    the largest k eigenvalues of w H Hᵀ w: singular vectors times singular values. Token-wise layers
    have a name of θ of their own and are spanned apart from the others.

    Args:
        count: of the directions; fewer where the ways are shorter.
    """
    with safe_open(ways[0], "pt") as first:
        names = [name.rpartition("/")[0] for name in first.keys() if name.endswith(GRADIENTS)]  # noqa: SIM118
    found: dict[str, Tensor] = {}
    for key in sorted({name.partition("/")[0] for name in names}):
        found |= _of_theta([name for name in names if name.partition("/")[0] == key], ways, count)
    return found


def _of_theta(names: Sequence[str], ways: Sequence[Path], count: int) -> dict[str, Tensor]:
    """The same for the layers of one name of θ."""
    held, of_place = _held(ways, names[0])
    products, size = held @ held.T, held.shape[1]
    for name in names[1:]:
        held, _ = _held(ways, name)
        products, size = products + held @ held.T, size + held.shape[1]
    lengths = products.diagonal().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    weights = torch.where(of_place, WEIGHT / lengths[of_place].mean(), 1 / lengths)
    squares, vectors = torch.linalg.eigh(weights[:, None] * products * weights)
    squares, vectors = squares.flip(0)[:count], vectors.flip(1)[:, :count]
    shares = (vectors * weights[:, None]).T * (size / squares.sum()).sqrt()
    return {
        name.partition("/")[2]: (shares @ _held(ways, name)[0]).half().contiguous()
        for name in names
    }


def _held(ways: Sequence[Path], name: str) -> tuple[Tensor, Tensor]:
    """Gradients and places of a layer on all ways, float64 [rows of H, rows], and which is which
    (True for places).
    """
    parts, kinds = [], []
    for way in ways:
        with safe_open(way, "pt") as file:
            held = set(file.keys())
            for kind in (GRADIENTS, PLACES):
                if f"{name}/{kind}" in held:
                    parts.append(file.get_tensor(f"{name}/{kind}").double())
                    kinds.append(torch.full((len(parts[-1]),), kind == PLACES))
    return torch.cat(parts), torch.cat(kinds)
