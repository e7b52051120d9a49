"""Factors of a layer's inputs and outputs: how numbers of whole rows and block columns are shown without touching a weight.

With s' = s · r[o] · q[g] a layer gives y = r ∘ ((x ∘ expand(q)) Wᵀ), on any back-end and with other factors for every example.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qzo_diffusion.core.errors import ModelError


@dataclass(frozen=True)
class LayerGain:
    """Factors of one layer: y = output ∘ ((input ∘ x) Wᵀ) + bias, fp32.

    One row for each group of neighbouring examples, so the number of rows divides the batch: one row for all, two for a batch of
    +ε and then -ε, or one per example. More rows than examples give each example several, one for each of equally long runs of
    its tokens. output [G, N] or [G, 1]; input [G, K / blocksize], one factor per block of columns.
    """

    output: Tensor | None = None
    input: Tensor | None = None


Gains = Callable[[Sequence[str]], Mapping[str, LayerGain]]
"""Names of layers -> their factors; a layer that is left out has none."""


AT_ONCE = 2**19
"""So many numbers of 16 bits are multiplied at once on a CPU: 2 MB in fp32, which a cache holds. A large layer's at once take ten
times as long."""


MANY_TOKENS = 16
"""From so many in a group on, factors of blocks of inputs are written out, one for each input: a third to a half faster, for a
sixteenth of the inputs' numbers."""


def _scale(tensor: Tensor, factor: Tensor, bias: Tensor | None, into: Tensor) -> None:
    """bias + factor ∘ tensor, computed in fp32: bf16 would round a factor of 1.01 to 1.0078. `into` may be `tensor`.

    Args:
        tensor, into: [groups, tokens, ...].
        factor: [groups, 1, ...].
    """
    by_parts = tensor.device.type == "cpu" and tensor.dtype != factor.dtype  # a CPU would convert all of it first
    (_scale_by_parts if by_parts else _scale_at_once)(tensor, factor, bias, into)


def _scale_at_once(tensor: Tensor, factor: Tensor, bias: Tensor | None, into: Tensor) -> None:
    """In one pass, which on a GPU converts on its way."""
    if bias is None:
        torch.mul(tensor, factor, out=into)
    else:
        torch.addcmul(bias, tensor, factor, out=into)


def _scale_by_parts(tensor: Tensor, factor: Tensor, bias: Tensor | None, into: Tensor) -> None:
    for groups, tokens in _places(tensor):
        wide = tensor[groups, tokens].to(factor.dtype)
        _scale_at_once(wide, factor[groups], bias, into=wide)
        into[groups, tokens].copy_(wide)


def _places(tensor: Tensor) -> Iterator[tuple[slice, slice]]:
    """Groups and tokens of `tensor`, part by part."""
    groups, tokens = tensor.shape[:2]
    of_token = tensor[0, 0].numel()
    groups_at_once, tokens_at_once = max(1, AT_ONCE // (tokens * of_token)), max(1, AT_ONCE // of_token)
    for group in range(0, groups, groups_at_once):
        for token in range(0, tokens, tokens_at_once):
            yield slice(group, group + groups_at_once), slice(token, token + tokens_at_once)


class Factors:
    """A layer's gain made ready. The bias keeps its size: the layer runs without it, and it is added after the product."""

    def __init__(self, name: str, gain: LayerGain, bias: Tensor | None) -> None:
        self._name, self._input, self._output = name, gain.input, gain.output
        self._bias = None if bias is None or gain.output is None else bias.detach().to(gain.output.dtype)
        self.scales_inputs = gain.input is not None

    def of_input(self, x: Tensor) -> Tensor:
        """A new tensor: several layers may read the same x."""
        assert self._input is not None
        groups, blocks = self._input.shape
        self._check(x, groups)
        by_block, factor = x.reshape(groups, -1, blocks, x.shape[-1] // blocks), self._input.view(groups, 1, blocks, 1)
        if by_block.shape[1] >= MANY_TOKENS:
            by_block, factor = by_block.flatten(2), factor.expand(-1, -1, -1, by_block.shape[-1]).flatten(2)
        scaled = torch.empty_like(by_block)
        _scale(by_block, factor, None, into=scaled)
        return scaled.view(x.shape)

    def of_output_(self, output: Tensor) -> None:
        """In place: the layer has just made it, and a second tensor of its size would cost more than the product."""
        if self._output is None:
            return
        groups = self._output.shape[0]
        self._check(output, groups)
        y = output.view(groups, -1, output.shape[-1])
        _scale(y, self._output.unsqueeze(1), self._bias, into=y)

    def _check(self, tensor: Tensor, groups: int) -> None:
        examples, tokens = tensor.shape[0], tensor.shape[1] if tensor.dim() == 3 else 1
        if examples % groups and (groups % examples or tokens % (groups // examples)):
            raise ModelError(
                f"{self._name} runs on a first dimension of {examples}, of {tokens} tokens each, where {groups} groups are probed",
                "groups of whole examples, or of equally long runs of an example's tokens",
                "use parametrization dense, or a model that keeps examples apart in its first dimension; or qzo.regions=1",
            )


def no_bias(bias: nn.Parameter) -> nn.Parameter | None:
    """What a layer has in place of its bias while it is under a gain.

    In 16 bits zeros: without a bias torch's product takes another path, whose buffers leave holes as large as a layer's weight in
    the allocator's heap (130 MB more on SD3.5 Large, for a hundredth of the time).
    """
    return nn.Parameter(torch.zeros_like(bias), False) if bias.dtype in (torch.bfloat16, torch.float16) else None
