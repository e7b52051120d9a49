"""SVDQuant (arXiv 2411.05007): a branch of 16 bits takes the largest singular values of a weight,
and 4 bits the rest.

    W · smooth ≈ up · down + codes · scales      codes -7 .. 7, a scale for each run of inputs

The layer divides its inputs by `smooth`, which is larger for inputs with large peaks. Without
known peaks it is one. Peaks matter where inputs are rounded to 4 bits as well (W4A4). All is
computed in float64, so that machines which round differently give the same codes."""

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from qzo_diffusion.quant.branched import BranchedLinear, residual_of
from qzo_diffusion.quant.factors import low_rank

RANK, LARGEST, ZERO = 32, 7, 8
STRENGTH = 0.5  # of smoothing: 0 leaves all peaks to the inputs, 1 moves all into the weight
Peaks = Mapping[str, Tensor]
"""Names of layers -> the largest magnitude of each input, fp32 [K]."""


def quantized_layer(
    weight: Tensor,
    bias: Tensor | None,
    blocksize: int,
    *,
    rounds_inputs: bool = False,
    peaks: Tensor | None = None,
    rank: int = RANK,
) -> BranchedLinear:
    """A layer for weight [N, K], on its device.

    Args:
        blocksize: inputs that share a scale.
        peaks: the largest magnitude of each input, [K].
        rank: of the branch; 0 for none, which leaves plain int4.
    """
    wide = weight.detach().double()
    smooth = None if peaks is None else smoothing(wide, peaks.to(wide))
    scaled = wide if smooth is None else wide * smooth.to(weight.dtype).double()
    factors = low_rank(scaled, min(rank, min(scaled.shape) // 2))
    up, down = factors.up.to(weight.device), factors.down.to(weight.device)
    runs = (scaled - up.double() @ down.double()).unflatten(1, (-1, blocksize))
    scales = runs.abs().amax(2).div(LARGEST)
    steps = (runs / scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(2)).round()
    codes = (steps + ZERO).to(torch.uint8)
    return BranchedLinear(
        residual_of(codes, torch.full_like(scales, ZERO), scales),
        (up, down) if rank else None,
        bias,
        smooth=None if smooth is None else smooth.to(weight.dtype),
        rounds_inputs=rounds_inputs,
    )


def smoothing(weight: Tensor, peaks: Tensor) -> Tensor:
    """What inputs are divided by, [K]: large where they have peaks and the weight has none."""
    tiny = torch.finfo(torch.float32).eps
    of_weight = weight.abs().amax(0).clamp(min=tiny)
    found = peaks.clamp(min=tiny) ** STRENGTH / of_weight ** (1 - STRENGTH)
    found = found / found.log().mean().exp()  # around one, within the range of 16 bits
    return found.clamp(min=2.0**-10, max=2.0**10)


def input_peaks(
    model: nn.Module, layers: Collection[str], forwards: Callable[[], object]
) -> dict[str, Tensor]:
    """The largest magnitudes of the inputs of `layers` while `forwards` runs the model."""
    peaks: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def seen(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found = args[0].detach().float().abs().flatten(0, -2).amax(0)
            peaks[name] = torch.maximum(peaks.get(name, found), found)

        return seen

    hooks = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in layers]
    try:
        with torch.no_grad():
            forwards()
    finally:
        for hook in hooks:
            hook.remove()
    return peaks
