"""The exact gradient of θ by autograd, for small models, to compare an estimate with.

Only benchmarks and diagnostics use it; training never differentiates. For a weight W = s · c, the
gradient with respect to a log-scale is the sum of dL/dW ∘ W over the weights that it scales. That
of a row, a block column or a layer is a sum of those."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qzo_diffusion.core.dense import Dense
from qzo_diffusion.core.grouped import Grouped
from qzo_diffusion.core.hooks import Hooks
from qzo_diffusion.core.optimizer import Update, gradient_of
from qzo_diffusion.core.probes import Batch, Objective
from qzo_diffusion.core.scales import ScaleHandle, ScaleSet
from qzo_diffusion.core.spsa import Estimate


class DifferentiableHandle(ScaleHandle, Protocol):
    def dequantized(self) -> Tensor:
        """The weight [N, K] at the scales in use."""
        ...


def exact_gradient(
    objective: Objective[Batch],
    micro_batches: Sequence[Batch],
    theta: Dense | Grouped,
    handles: Iterable[DifferentiableHandle],
) -> dict[str, Tensor]:
    """dL/dθ by name, in the shapes of `theta.templates()`; L is the mean over all examples.

    Args:
        handles: of all quantized layers of the model.
    """
    scales, count = theta.scales, sum(map(len, micro_batches))  # type: ignore[arg-type]
    with (
        torch.enable_grad(),
        scales.override(theta.perturbed()),
        _differentiable(scales, handles) as deltas,
    ):
        for micro_batch in micro_batches:
            of_each = objective(micro_batch).view(len(micro_batch), -1).mean(1)  # type: ignore[arg-type]
            (of_each.sum() / count).backward()
        grids = {
            name: torch.zeros_like(delta) if delta.grad is None else delta.grad
            for name, delta in deltas.items()
        }
    if isinstance(theta, Dense):
        return {name: grids[name].view_as(live) for name, live in theta.templates().items()}
    return {
        key: torch.cat([_SUMS[theta.axis(key)](grids[name]) for name in theta.layers(key)])
        for key in theta.by_axis
    }


_SUMS: dict[str, Callable[[Tensor], Tensor]] = {
    "row": lambda grid: grid.sum(1),
    "column": lambda grid: grid.sum(0),
    "layer": lambda grid: grid.sum().view(1),
}


@contextmanager
def _differentiable(
    scales: ScaleSet, handles: Iterable[DifferentiableHandle]
) -> Iterator[dict[str, Tensor]]:
    """While open, forward passes use scale · exp(δ), with a δ of zeros [N, K / blocksize] per layer
    that gradients reach.
    """
    deltas: dict[str, Tensor] = {}
    hooks = Hooks()

    def product_with(handle: DifferentiableHandle, delta: Tensor) -> Callable[..., Tensor]:
        def product(module: nn.Module, args: tuple[Any, ...], _output: Tensor) -> Tensor:
            weight = handle.dequantized()
            blocks = weight.view(*delta.shape, -1).to(delta.dtype) * torch.exp(delta).unsqueeze(2)
            return F.linear(args[0], blocks.view_as(weight).to(args[0].dtype), module.bias)  # type: ignore[arg-type]

        return product

    try:
        try:
            for handle in handles:
                live = scales[handle.name]
                deltas[handle.name] = (
                    torch.zeros_like(live).view(scales.rows(handle.name), -1).requires_grad_()
                )
                hooks.after(handle.module, product_with(handle, deltas[handle.name]))
            yield deltas
        finally:
            hooks.remove()
    finally:  # once more: an interrupt may have cut the first one short
        hooks.remove()


@dataclass(frozen=True)
class Alignment:
    """How well an estimate agrees with the exact gradient of the same batch.

    Attributes:
        cosine: between the two.
        expected_cosine: √(n / (n + D)), the mean for n independent directions in D dimensions.
    """

    cosine: float
    expected_cosine: float
    exact_norm: float
    estimate_norm: float


def alignment(theta: Dense | Grouped, found: Estimate, exact: dict[str, Tensor]) -> Alignment:
    """Compare an estimate with the exact gradient of the same batch."""
    update = Update(found.directions, found.projected_grad, lr=1.0)
    estimated = torch.cat([gradient_of(theta, update, name).double().flatten() for name in exact])
    wanted = torch.cat([tensor.double().flatten() for tensor in exact.values()])
    lengths = estimated.norm().item(), wanted.norm().item()
    cosine = (estimated @ wanted).item() / (lengths[0] * lengths[1]) if all(lengths) else math.nan
    return Alignment(
        cosine,
        math.sqrt(found.independent / (found.independent + len(wanted))),
        lengths[1],
        lengths[0],
    )
