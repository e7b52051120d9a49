"""Strength, mixing and undo: interpolate log-scales between a base and tuned scales.

    s = base · Π_i (tuned_i / base) ^ weight_i

Weight 1 alone gives the tuned scales bit for bit, weight 0 the base. A scale that was tuned to
zero, or is zero in the base (a block of zeros), has no logarithm: it goes to the tuned value in
proportion to its weight, and stays on its side of zero. Scales may be negative; their sign is the
base's."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.core.scales import ScaleSet


def merge_changes_(scales: ScaleSet, tuned: Sequence[tuple[Mapping[str, Tensor], float]]) -> None:
    """Set the live scales, which must hold the base, to the mix of all `(tuned scales, weight)`.

    Raises:
        ModelError: other layers or shapes than the base has, or numbers that no scale can have.
    """
    for tensors, _ in tuned:
        check_fits(scales, tensors)
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
            live.copy_(_finite(name, _mixed(live, parts)))


def _mixed(base: Tensor, parts: Sequence[tuple[Tensor, float]]) -> Tensor:
    """base · Π (tuned / base)^weight; linear and on the base's side where a scale is zero."""
    exponent, straight = torch.zeros_like(base), base.clone()
    has_logarithm = base != 0
    for tensor, weight in parts:
        has_logarithm = has_logarithm & (tensor != 0)
        exponent = exponent + torch.log(tensor / base) * weight
        straight = straight + (tensor - base) * weight
    one_sided = torch.where(base < 0, straight.clamp(max=0), straight.clamp(min=0))
    return torch.where(has_logarithm, base * torch.exp(exponent), one_sided)


def _finite(name: str, mixed: Tensor) -> Tensor:
    if not bool(mixed.isfinite().all()):
        raise ModelError(
            f"strengths or weights that make the scales of {name} infinite",
            "scales that are finite",
            "give smaller ones",
        )
    return mixed


def check_fits(scales: ScaleSet, tensors: Mapping[str, Tensor]) -> None:
    """Check that `tensors` can take the place of the live scales, which must hold the base.

    Raises:
        ModelError: other layers, shapes or dtypes; numbers that are not finite; a scale of the
            other sign than the base's.
    """
    live = scales.tensors()
    wrong = sorted(live.keys() ^ tensors.keys()) + [
        name for name in live.keys() & tensors.keys() if not _alike(live[name], tensors[name])
    ]
    if wrong:
        raise ModelError(
            f"tuned scales that do not fit this model, for example at {wrong[0]}",
            "scales of the same layers and block size",
            "give the model and quantization that the run was tuned on",
        )
    check_numbers(scales, tensors)


def check_numbers(scales: ScaleSet, tensors: Mapping[str, Tensor]) -> None:
    """Check tensors that are known to have the names and shapes of `scales`.

    Raises:
        ModelError: numbers that are not finite; a scale of the other sign than the base's.
    """
    for name, base in scales.tensors().items():
        _check_layer(name, base, tensors[name].to(base.device), signed=name in scales.weights)


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype


def _check_layer(name: str, base: Tensor, tuned: Tensor, signed: bool) -> None:
    if not base.is_floating_point():
        return
    if not bool(tuned.isfinite().all()):
        reason = "numbers that are not finite"
    elif not signed and bool((base.sign() * tuned.sign() < 0).any()):
        reason = "scales of the other sign than the base has"
    elif not signed and bool(((base == 0) & (tuned < 0)).any()):
        reason = "negative scales where the base has zero"
    else:
        return
    raise ModelError(
        f"{reason}, in {name}",
        "finite scales of the base's sign",
        "use the run as it was written, or tune it again",
    )
