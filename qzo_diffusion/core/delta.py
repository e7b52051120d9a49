"""Store the change of tuned scales in little space: factors of layers, rows or block columns where
they give the scales back exactly.

    s[o, g] = s0[o, g] · row[o] · column[g]   (+ a few units in the last place)

Scales that were tuned as groups fit with one factor a group, bit for bit. Rows and columns together
round twice, so a byte a scale says by how many units in the last place the product is off. Scales
that were tuned one by one are stored as they are."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.core.merge import check_fits
from qzo_diffusion.core.scales import ScaleSet

ROW, COLUMN, ULPS, WHOLE = ":row", ":column", ":ulps", ":scales"


def shrunk(scales: ScaleSet, tuned: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The changes from the live scales (the base) to `tuned`; unchanged layers are left out.

    Raises ModelError when `tuned` does not fit the base.
    """
    check_fits(scales, tuned)
    stored: dict[str, Tensor] = {}
    for name in scales:
        base, wanted = scales[name], tuned[name].to(scales[name].device)
        if not torch.equal(base, wanted):
            stored |= {
                name + part: tensor
                for part, tensor in _changes(base, wanted, scales.rows(name)).items()
            }
    return stored


def expanded(scales: ScaleSet, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tuned scales of every layer, from the live scales (the base) and what `shrunk` gave.

    Raises:
        ModelError: changes of another model, or that lead to numbers that no scale can have.
    """
    known = {name + part for name in scales for part in (ROW, COLUMN, ULPS, WHOLE)}
    unknown = sorted(stored.keys() - known)
    if unknown:
        raise _of_another_model(unknown[0])
    tuned: dict[str, Tensor] = {}
    for name in scales:
        parts = {
            part: stored[name + part].to(scales[name].device)
            for part in (ROW, COLUMN, ULPS, WHOLE)
            if name + part in stored
        }
        if not _fitting(scales[name], parts, scales.rows(name)):
            raise _of_another_model(name)
        tuned[name] = (
            _applied(scales[name], parts, scales.rows(name)) if parts else scales[name].clone()
        )
    check_fits(scales, tuned)
    return tuned


def _fitting(base: Tensor, parts: Mapping[str, Tensor], rows: int) -> bool:
    """Return whether the parts have the shapes and dtypes that `shrunk` gives them."""
    if parts.keys() <= {WHOLE}:
        return all(
            part.dtype == base.dtype and part.numel() == base.numel() for part in parts.values()
        )
    if WHOLE in parts or base.dtype != torch.float32 or base.numel() % rows:
        return False
    columns = base.numel() // rows
    shapes = {ROW: ((1, 1), (rows, 1)), COLUMN: ((1, columns),), ULPS: ((rows, columns),)}
    return all(
        tuple(tensor.shape) in shapes[part]
        and tensor.dtype == (torch.int8 if part == ULPS else torch.float32)
        for part, tensor in parts.items()
    )


def _applied(base: Tensor, parts: Mapping[str, Tensor], rows: int) -> Tensor:
    """The base's scales with the stored changes of one layer."""
    if WHOLE in parts:
        return parts[WHOLE].view_as(base).clone()
    grid = base.view(rows, -1)
    for part in (ROW, COLUMN):
        if part in parts:
            grid = grid * parts[part]
    if ULPS in parts:
        grid = (grid.contiguous().view(torch.int32) + parts[ULPS]).view(torch.float32)
    return grid.reshape(base.shape)


def _changes(base: Tensor, wanted: Tensor, rows: int) -> dict[str, Tensor]:
    """The smallest entries from which `_applied` gives `wanted` bit for bit."""
    if base.dtype != torch.float32 or base.numel() % rows:
        return {WHOLE: wanted}
    both: dict[str, Tensor] | None = None
    for parts in _candidates(base.view(rows, -1), wanted.view(rows, -1)):
        if torch.equal(_applied(base, parts, rows), wanted):
            return parts
        both = parts if parts.keys() == {ROW, COLUMN} else both
    assert both is not None
    off = wanted.view(torch.int32).long() - _applied(base, both, rows).view(torch.int32)
    if off.abs().amax() > 127:
        return {WHOLE: wanted}
    return both | {ULPS: off.to(torch.int8).view(rows, -1)}


def _candidates(base: Tensor, wanted: Tensor) -> Iterator[dict[str, Tensor]]:
    """Factors in the shapes [1, 1], [N, 1], [1, G], and both of the last."""
    ratio = torch.where(base != 0, wanted.double() / base.double(), 1.0)
    for dims, part in (((0, 1), ROW), ((1,), ROW), ((0,), COLUMN)):
        yield {part: _exact(ratio, base, wanted, dims)}
    row = _mean(ratio, base, (1,))
    yield {ROW: row, COLUMN: _mean(ratio / row.double(), base, (0,))}


def _exact(ratio: Tensor, base: Tensor, wanted: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The factor of each group that gives back most of its scales: the mean change or the next
    float.
    """
    best = mean = _mean(ratio, base, dims)
    misses = (base * best != wanted).sum(dims, keepdim=True)
    for towards in (2.0, 0.0):
        other = torch.nextafter(mean, torch.full_like(mean, towards))
        missed = (base * other != wanted).sum(dims, keepdim=True)
        best, misses = torch.where(missed < misses, other, best), torch.minimum(missed, misses)
    return best


def _mean(ratio: Tensor, base: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The mean ratio of each group over scales that are not zero; 1 for groups of zeros."""
    weight = (base != 0).double()
    total = weight.sum(dims, keepdim=True)
    return torch.where(
        total > 0, (ratio * weight).sum(dims, keepdim=True) / total.clamp(min=1), 1.0
    ).float()


def _of_another_model(name: str) -> ModelError:
    return ModelError(
        f"changes that do not fit this model, for example at {name}",
        "changes of its layers",
        "give the base of the run",
    )
