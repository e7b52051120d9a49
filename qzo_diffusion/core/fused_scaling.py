"""Scale a layer's inputs or outputs on a GPU in one pass over memory.

Torch multiplies tensors of two dtypes, one of them broadcast, at a fifth of the memory's speed: for
SD3.5 Large that takes 40 % of a forward pass on an H100 (docs/cost.md). Importing this needs
Triton, which comes with torch for Linux."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 1024  # of a program


@triton.jit
def _scale_rows(  # type: ignore[no-untyped-def]
    x,
    factor,
    bias,
    into,
    width,
    tokens,
    stride,
    blocksize,
    has_bias: tl.constexpr,
    columns: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * columns + tl.arange(0, columns)
    inside = column < width
    value = tl.load(x + row * width + column, mask=inside).to(tl.float32)
    value *= tl.load(factor + (row // tokens) * stride + column // blocksize, mask=inside)
    if has_bias:
        value += tl.load(bias + column, mask=inside).to(tl.float32)
    tl.store(into + row * width + column, value, mask=inside)


def scale(x: Tensor, factor: Tensor, bias: Tensor | None, into: Tensor) -> None:
    """into = x ∘ factor + bias, computed in fp32.

    Args:
        x, into: [groups, tokens, width], contiguous; `into` may be `x`.
        factor: fp32 [groups, blocks], rows may be apart; one for each of `blocks` equal runs of
            columns.
        bias: [width].
    """
    groups, tokens, width = x.shape
    grid: Any = (groups * tokens, triton.cdiv(width, COLUMNS))
    _scale_rows[grid](
        x,
        factor,
        bias,
        into,
        width,
        tokens,
        factor.stride(0),
        width // factor.shape[1],
        bias is not None,
        COLUMNS,
    )
