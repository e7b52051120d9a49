"""Strength, mixing and undo: straight lines in log-scales between a base and what was tuned from
it.

    s = base · Π_i (tuned_i / base) ^ weight_i

Weight 1 alone gives the tuned scales bit for bit, weight 0 the base. A scale that was tuned to
zero, or is zero in the base (a block of zeros), has no logarithm: it goes to the tuned value in
proportion to its weight, and not below zero."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.core.scales import ScaleSet


def merge_changes_(scales: ScaleSet, tuned: Sequence[tuple[Mapping[str, Tensor], float]]) -> None:
    """Set the live scales, which must hold the base, to the blend of all `(tuned scales, weight)`.

    Raises:
        ModelError: other layers or shapes than the base has.
    """
    for tensors, _ in tuned:
        _check_fits(scales, tensors)
    for name in scales:
        live = scales[name]
        if not live.is_floating_point() and [weight for _, weight in tuned if weight != 0] not in (
            [],
            [1],
        ):
            raise ModelError(
                "integer codes, which have no steps in between",
                "one run, at strength 1",
                "leave --strength out",
            )
        parts = [
            (tensors[name].to(live.device), weight) for tensors, weight in tuned if weight != 0
        ]
        if len(parts) == 1 and parts[0][1] == 1:
            live.copy_(parts[0][0])
        elif parts:
            live.copy_(_blended(live, parts))


def _blended(base: Tensor, parts: Sequence[tuple[Tensor, float]]) -> Tensor:
    exponent, straight = torch.zeros_like(base), base.clone()
    has_logarithm = base > 0
    for tensor, weight in parts:
        has_logarithm = has_logarithm & (tensor > 0)
        exponent = exponent + torch.log(tensor / base) * weight
        straight = straight + (tensor - base) * weight
    return torch.where(has_logarithm, base * torch.exp(exponent), straight.clamp(min=0))


def _check_fits(scales: ScaleSet, tensors: Mapping[str, Tensor]) -> None:
    live = scales.tensors()
    wrong = sorted(live.keys() ^ tensors.keys()) + [
        name for name in live.keys() & tensors.keys() if live[name].shape != tensors[name].shape
    ]
    if wrong:
        raise ModelError(
            f"tuned scales that do not fit this model, for example at {wrong[0]}",
            "scales of the same layers and block size",
            "give the model and quantization that the run was tuned on",
        )
