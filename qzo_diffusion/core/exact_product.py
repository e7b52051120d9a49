"""Products with quantized weights that gradients pass, in little memory.

    y = x Wᵀ + bias          kept for the way back: x and the layer's scales, never W
    dL/dx = dL/dy W          W is dequantized again
    dL/d log s[o, g] = sum over block (o, g) of (dL/dyᵀ x) ∘ W

The last line is handed to `collect` layer by layer, so that no gradient of a whole model's scales
is held where θ has fewer numbers. With `checkpointed`, a block keeps its inputs alone and
is computed again on the way back."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qzo_diffusion.core.scales import ScaleHandle

AT_ONCE = 2**22
"""Weights of a layer whose gradient is computed at once: 16 MB in fp32."""

Collect = Callable[[str, Tensor], None]
"""Takes the name of a layer and dL/d log s of all of its scales, [N, K / blocksize]."""


class DifferentiableHandle(ScaleHandle, Protocol):
    def dequantized(self) -> Tensor:
        """The weight [N, K] at the scales in use."""
        ...


@contextmanager
def exact_products(handles: Iterable[DifferentiableHandle], collect: Collect) -> Iterator[None]:
    """While open, forward passes of these layers compute `y` as above, and `collect` is called on
    the way back, once for each forward pass of a layer.
    """
    anchor = torch.zeros((), requires_grad=True)  # the first layers' inputs need no gradient

    def product_of(handle: DifferentiableHandle) -> Callable[[Tensor], Tensor]:
        def product(x: Tensor) -> Tensor:
            y: Tensor = _Product.apply(x, handle.scales, anchor, handle, collect)
            bias: Any = handle.module.bias
            return y if bias is None else y + bias

        return product

    with _forwards({handle.module: product_of(handle) for handle in handles}):
        yield


def nothing() -> None:
    """Leave memory as it is."""


@contextmanager
def checkpointed(
    blocks: Sequence[nn.Module], tidy: Callable[[], object] = nothing
) -> Iterator[None]:
    """While open, each block keeps its inputs for the way back and nothing else.

    Args:
        tidy: is called before a block is computed, and before it is computed again.
    """

    def forward_of(block: nn.Module) -> Callable[..., Any]:
        plain = block.forward

        def compute(*args: Any, **options: Any) -> Any:
            tidy()
            return plain(*args, **options)

        def forward(*args: Any, **options: Any) -> Any:
            # nothing random happens inside, so the state of generators is left alone
            return checkpoint(
                compute, *args, use_reentrant=False, preserve_rng_state=False, **options
            )

        return forward

    with _forwards({block: forward_of(block) for block in blocks}):
        yield


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model: members of its outermost lists of several modules."""
    found, inside = list[nn.Module](), tuple[str, ...]()
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1 and not name.startswith(inside):
            found += list(module)
            inside = (*inside, f"{name}.")
    return found


@contextmanager
def _forwards(made: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """While open, modules have other forwards. An interrupt may come at any moment."""
    own = {module: vars(module)["forward"] for module in made if "forward" in vars(module)}

    def restore() -> None:
        for module in made:
            vars(module).pop("forward", None)
        for module, forward in own.items():
            vars(module)["forward"] = forward

    try:
        try:
            for module, forward in made.items():
                vars(module)["forward"] = forward
            yield
        finally:
            restore()
    finally:  # once more: an interrupt may have cut the first one short
        restore()


class _Product(torch.autograd.Function):
    """x Wᵀ, whose way back dequantizes W again, at the scales that the forward pass had."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scales: Tensor,
        anchor: Tensor,
        handle: DifferentiableHandle,
        collect: Collect,
    ) -> Tensor:
        ctx.save_for_backward(x, scales)
        ctx.handle, ctx.collect = handle, collect
        return F.linear(x, handle.dequantized().to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> tuple[Tensor | None, ...]:
        (slope,), (x, scales) = slopes, ctx.saved_tensors
        weight = _at(ctx.handle, scales)
        ctx.collect(ctx.handle.name, _grid(slope, x, weight, scales))
        back = slope @ weight.to(slope.dtype) if ctx.needs_input_grad[0] else None
        return back, None, torch.zeros(()), None, None


def _at(handle: DifferentiableHandle, scales: Tensor) -> Tensor:
    """The layer's weight at these scales; those that it shows stay."""
    shown = handle.scales
    try:
        handle.override(scales)
        return handle.dequantized()
    finally:
        handle.override(shown)


def _grid(slope: Tensor, x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """Sums of dL/dW ∘ W over the blocks, [N, K / blocksize] in the scales' dtype."""
    rows, columns = weight.shape
    slopes, inputs = slope.reshape(-1, rows), x.reshape(-1, columns)
    at_once = max(1, AT_ONCE // columns)
    parts = []
    for start in range(0, rows, at_once):
        of_rows = slice(start, start + at_once)
        of_weights = (slopes[:, of_rows].T @ inputs).to(scales.dtype)
        of_weights *= weight[of_rows]
        parts.append(of_weights.view(len(of_weights), scales.numel() // rows, -1).sum(2))
    return torch.cat(parts)
