"""KurTail (arXiv 2503.01483): rotations that make the layers' inputs flat, learned on a text.

Rounding to few bits is exact for flat inputs and poor for peaked ones. The measure of peaks is the
kurtosis of a token's inputs, mean(y⁴) / mean(y²)². One rotation of the residual stream makes it
least for all attentions and feed-forwards together, and one for each block for the heads' values.
A rotation keeps mean(y²), so the derivative is that of a sum of fourth powers and needs no backward
pass. Steps stay on the rotations by the Cayley transform (arXiv 2002.01113)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qzo_diffusion.llm import decoder as parts
from qzo_diffusion.llm.calibration import layer_inputs
from qzo_diffusion.llm.decoder import Decoder
from qzo_diffusion.llm.transform import Transform, rotated
from qzo_diffusion.quant.hadamard import hadamard_map
from qzo_diffusion.quant.kronecker import rotation

STEPS, ROWS = 150, 2048  # rows of a step
ANGLE = 0.05  # root mean square of the angles of the first step, which fall to zero
MOMENTUM = 0.9
SEED = 0
RESIDUAL = "residual"


def learned(sizes: Decoder, model: Any, windows: Tensor) -> dict[str, Tensor]:
    """Return the rotations, float64: `residual` [width, width], and `heads.N` [head, head].

    Args:
        model: the unquantized model, on the CPU.
        windows: tokens of the calibration text, int64 [windows, tokens].
    """
    read = [f"{name}.{layers[0]}" for name in sizes.names() for layers in parts.NORMS.values()]
    out = [f"{name}.{parts.OUT_OF_ATTENTION}" for name in sizes.names()]
    inputs = layer_inputs(model, windows, [*read, *out])
    norms = [f"{name}.{norm}" for name in sizes.names() for norm in parts.NORMS]
    gains = [model.get_submodule(norm).weight.detach().float() for norm in norms]
    streams = [inputs[name] / _never_zero(gain) for name, gain in zip(read, gains, strict=True)]
    found = {RESIDUAL: least_kurtosis(torch.cat(streams), hadamard_map(sizes.width).matrix())}
    for index, name in enumerate(out):
        values = inputs[name].unflatten(-1, (sizes.query_heads, sizes.head)).flatten(0, 1)
        found[f"heads.{index}"] = least_kurtosis(values, hadamard_map(sizes.head).matrix())
    return found


def transform(sizes: Decoder, tensors: Mapping[str, Tensor]) -> Transform:
    """Return the maps of a decoder with these rotations; the last one is QuaRot's."""
    heads = [tensors[f"heads.{index}"] for index in range(sizes.blocks)]
    return rotated(sizes, rotation(tensors[RESIDUAL]), heads, hadamard_map(sizes.inner))


def least_kurtosis(rows: Tensor, start: Tensor) -> Tensor:
    """Return the orthogonal matrix R, float64 [K, K], with a low mean kurtosis of `rows` R.

    Args:
        rows: fp32 [M, K].
        start: R before the first step.
    """
    flat = rows / _never_zero(rows.square().mean(1, keepdim=True).sqrt())
    generator = torch.Generator().manual_seed(SEED)
    found, moving = start.double(), torch.zeros_like(start, dtype=torch.float64)
    for step in range(STEPS):
        drawn = flat[torch.randint(len(flat), (min(ROWS, len(flat)),), generator=generator)]
        slope = drawn.T @ (drawn @ found.float()).pow(3)
        turn = slope.double() @ found.T
        moving = MOMENTUM * moving + (turn - turn.T)
        angle = ANGLE * (1 - step / STEPS) / _never_zero(moving.square().mean().sqrt())
        found = cayley(found, moving * (angle / len(moving) ** 0.5))
    return found.contiguous()


def kurtosis(rows: Tensor) -> Tensor:
    """Return the mean over rows [M, K] of mean(y⁴) / mean(y²)²; 3 for normal numbers."""
    return (rows.pow(4).mean(1) / rows.square().mean(1).square()).mean()


def cayley(found: Tensor, turn: Tensor) -> Tensor:
    """Return (I + turn / 2)⁻¹ (I - turn / 2) R, orthogonal for a skew `turn`."""
    one, half = torch.eye(len(turn), dtype=turn.dtype), turn / 2
    return torch.linalg.solve(one + half, (one - half) @ found)


def _never_zero(tensor: Tensor) -> Tensor:
    tiny = torch.finfo(tensor.dtype).tiny
    return torch.where(tensor.abs() < tiny, torch.full_like(tensor, tiny), tensor)
