"""The exact gradient of θ by autograd: for `--method fo-scales`, and to compare an estimate with.

The other methods never differentiate. For a weight W = s · c, the gradient with respect to a
log-scale is the sum of dL/dW ∘ W over the weights that it scales. That of a row, a block column or
a layer is a sum of those. Where each example or patch group has its own θ, θ scales activations as
in training."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qzo_diffusion.core.dense import Dense
from qzo_diffusion.core.exact_product import (
    Collect,
    DifferentiableHandle,
    checkpointed,
    exact_products,
    nothing,
)
from qzo_diffusion.core.grouped import Grouped
from qzo_diffusion.core.hooks import Hooks
from qzo_diffusion.core.optimizer import Update, gradient_of
from qzo_diffusion.core.probes import Batch, Objective
from qzo_diffusion.core.scales import ScaleSet
from qzo_diffusion.core.spsa import Estimate


def exact_gradient(
    objective: Objective[Batch],
    micro_batches: Sequence[Batch],
    theta: Dense | Grouped,
    handles: Iterable[DifferentiableHandle],
    blocks: Sequence[nn.Module] = (),
    tidy: Callable[[], object] = nothing,
) -> dict[str, Tensor]:
    """dL/dθ by name, in the shapes of `theta.templates()`; L is the mean over all examples.

    Args:
        handles: of all quantized layers of the model.
        blocks: parts of the model that are computed again on the way back, and tidy: is called
            before each, see `core.exact_product`.
    """
    scales, count = theta.scales, sum(map(len, micro_batches))  # type: ignore[arg-type]
    found = {name: torch.zeros_like(like) for name, like in theta.templates().items()}
    with (
        _restored(scales),
        torch.enable_grad(),
        scales.override(theta.perturbed()),
        exact_products(handles, _collecting(theta, found)),
        checkpointed(blocks, tidy),
    ):
        for micro_batch in micro_batches:
            of_each = objective(micro_batch).view(len(micro_batch), -1).mean(1)  # type: ignore[arg-type]
            (of_each.sum() / count).backward()
    return found


@contextmanager
def _restored(scales: ScaleSet) -> Iterator[None]:
    """Put the live scales of every layer back, also those that the way back has shown."""
    try:
        try:
            yield
        finally:
            scales.restore(scales)
    finally:  # once more: an interrupt may have cut the first one short
        scales.restore(scales)


def _collecting(theta: Dense | Grouped, found: Mapping[str, Tensor]) -> Collect:
    """Add the gradient of a layer's log-scales to that of the θ which move them."""

    def collect(name: str, grid: Tensor) -> None:
        if isinstance(theta, Dense):
            if name in found:
                found[name].add_(grid.view_as(found[name]))
            return
        for key in theta.by_axis:
            if name in theta.layers(key):
                found[key][theta.place(key, name)] += _SUMS[theta.axis(key)](grid)

    return collect


_SUMS: dict[str, Callable[[Tensor], Tensor]] = {
    "row": lambda grid: grid.sum(1),
    "column": lambda grid: grid.sum(0),
    "layer": lambda grid: grid.sum().view(1),
}


def patch_group_gradients(
    objective: Objective[Batch],
    micro_batch: Batch,
    theta: Grouped,
    handles: Iterable[DifferentiableHandle],
    patch_groups: int,
) -> Iterator[dict[str, Tensor]]:
    """For each patch group in turn the gradients of its losses, one for each example.

    The derivative of L[i, p] is taken for the θ of example i alone: {key: [B, 1, n]}. Where layers
    are token-wise it is taken for each patch group q in which θ acts: {key: [B, P, n]}. Entries
    q ≠ p are the effect on L[i, p] through attention.

    Args:
        objective: P losses for each example, [B, P].
        handles: of all quantized layers of the model.

    Raises:
        ValueError: another number of losses.
    """
    scales, size = theta.scales, len(micro_batch)  # type: ignore[arg-type]
    own = {
        key: like.new_zeros(size, patch_groups if theta.is_token_wise(key) else 1, like.numel())
        for key, like in theta.templates().items()
    }
    leaves = [one.requires_grad_() for one in own.values()]
    products = {
        handle.name: (handle, _scaled_product(handle, _factors_of(handle.name, theta, own)))
        for handle in handles
    }
    with torch.enable_grad(), scales.override(theta.perturbed()), _products(products):
        losses = objective(micro_batch)
    if losses.numel() != size * patch_groups:
        raise ValueError(f"{losses.numel()} losses for {size} examples of {patch_groups} groups")
    for group, of_group in enumerate(losses.view(size, patch_groups).sum(0).unbind()):
        more = group + 1 < patch_groups
        found = torch.autograd.grad(
            of_group, leaves, retain_graph=more, allow_unused=True, materialize_grads=True
        )
        yield dict(zip(own, found, strict=True))


def _factors_of(name: str, theta: Grouped, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a layer in the θ of each example, by axis: [B · groups, n]."""
    return {
        theta.axis(key): part.flatten(0, 1)[:, theta.place(key, name)]
        for key, part in own.items()
        if name in theta.layers(key)
    }


def _scaled_product(
    handle: DifferentiableHandle, own: Mapping[str, Tensor]
) -> Callable[..., Tensor]:
    """y = exp(row + layer) ∘ ((exp(column) ∘ x) Wᵀ) + bias, with θ for each run of tokens."""

    def scaled(x: Tensor, theta: Tensor) -> Tensor:
        runs, factors = (
            x.reshape(len(theta), -1, theta.shape[1], x.shape[-1] // theta.shape[1]),
            (torch.exp(theta).to(x.dtype)),
        )
        return (runs * factors[:, None, :, None]).view(x.shape)

    def product(module: nn.Module, args: tuple[Any, ...], _output: Tensor) -> Tensor:
        x: Tensor = args[0]
        x = scaled(x, own["column"]) if "column" in own else x
        y = F.linear(x, handle.dequantized().to(x.dtype))
        for axis in own.keys() & {"row", "layer"}:
            y = scaled(y, own[axis])
        return y if module.bias is None else y + module.bias  # type: ignore[operator]

    return product


@contextmanager
def _products(
    products: Mapping[str, tuple[DifferentiableHandle, Callable[..., Tensor]]],
) -> Iterator[None]:
    """While open, these hooks compute the outputs of their layers."""
    hooks = Hooks()
    try:
        try:
            for handle, product in products.values():
                hooks.after(handle.module, product)
            yield
        finally:
            hooks.remove()
    finally:  # once more: an interrupt may have cut the first one short
        hooks.remove()


@dataclass(frozen=True)
class Alignment:
    """Agreement of an estimate with the exact gradient of the same batch.

    `core.expected_cosine` says which cosine its directions allow.
    """

    cosine: float
    exact_norm: float
    estimate_norm: float


def alignment(theta: Dense | Grouped, found: Estimate, exact: dict[str, Tensor]) -> Alignment:
    """Compare an estimate with the exact gradient of the same batch."""
    update = Update(found.directions, found.projected_grad, lr=1.0)
    estimated = torch.cat([gradient_of(theta, update, name).double().flatten() for name in exact])
    wanted = torch.cat([tensor.double().flatten() for tensor in exact.values()])
    lengths = estimated.norm().item(), wanted.norm().item()
    cosine = (estimated @ wanted).item() / (lengths[0] * lengths[1]) if all(lengths) else math.nan
    return Alignment(cosine, lengths[1], lengths[0])
