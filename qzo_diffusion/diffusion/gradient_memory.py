"""Estimate the memory of a step by gradients (`--method fo-scales`) beside that of inference.

Blocks keep their inputs alone for the way back (`core.exact_product`), so a step holds the inputs
of all blocks, and everything of one."""

import torch

from qzo_diffusion.core.exact_product import AT_ONCE
from qzo_diffusion.diffusion.memory import ModelSize, forward_bytes, override_bytes, trained_bytes

# Tensors of all tokens at the peak of a block's way back, in the dtype of products. 26 are kept:
# norms 5, queries and keys before and after their norm 9, values 1, attention 3, feed-forward 8.
# 10 pass: the slopes of both sides of the feed-forward, and of the residuals. 1 is the next block's
# slope. A second attention of the image (Medium) keeps 13 more.
BLOCK_STATES = 37
DUAL_BLOCK_STATES = 50
LIKE_GRADIENT = ("sgd", "momentum")  # which remember nothing, and as much as a gradient


def gradient_bytes(
    size: ModelSize,
    blocks: tuple[int, bool],
    tokens: tuple[int, int],
    batch: int,
    dtype: torch.dtype,
    trained: tuple[str, int],
    device: str,
) -> dict[str, float]:
    """Return bytes by purpose.

    Args:
        blocks: how many the model has, and whether some have a second attention.
        tokens: of an image and of its text.
        batch: images of a forward pass.
        trained: parametrization, and bits of each number that Adam remembers.
    """
    count, dual = blocks
    hidden = float(batch * sum(tokens) * size.width * dtype.itemsize)
    states = DUAL_BLOCK_STATES if dual else BLOCK_STATES
    # its weight, and the gradient of a part of that: in the dtype of products, and in fp32
    one_layer = size.largest * dtype.itemsize + AT_ONCE * (dtype.itemsize + 4.0)
    way_back = states * hidden + one_layer + 4.0 * size.scales / count
    forward = forward_bytes(size, *tokens, batch, dtype)
    parametrization, bits = trained
    theta, with_gradient = (trained_bytes(size, parametrization, one, 32) for one in LIKE_GRADIENT)
    return {
        "inputs of blocks": count * hidden,
        "one block": max(forward, way_back),
        "overrides": override_bytes(size, parametrization, device),
        "trained numbers": trained_bytes(size, parametrization, "adam", bits),
        "gradient": with_gradient - theta,
    }
