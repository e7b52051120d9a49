"""Scale a layer's inputs and outputs instead of its weights.

With s' = s · r[o] · q[g] a layer gives y = r ∘ ((x ∘ expand(q)) Wᵀ), on any back-end, and each
example of a batch can have its own factors."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from qzo_diffusion.core.errors import ModelError


@dataclass(frozen=True)
class LayerScaling:
    """Factors of one layer: y = output ∘ ((input ∘ x) Wᵀ) + bias, in fp32.

    With G up to the batch size, each row serves an equal group of neighbouring examples. With more,
    each example has several rows, one for each of equally long runs of its tokens.

    Args:
        output: [G, N] or [G, 1].
        input: [G, K / blocksize], one factor for each block of columns.
        overwrites: whether the input may be overwritten, because nothing reads it afterwards.
        patch_groups: rows of an example.
    """

    output: Tensor | None = None
    input: Tensor | None = None
    overwrites: bool = False
    patch_groups: int = 1


ActivationScaling = Callable[[Sequence[str]], Mapping[str, LayerScaling]]
"""Names of layers -> their factors; a layer that is left out has none."""

AT_ONCE = 2**19
"""Elements of 16 bits that are multiplied at once on a CPU: 2 MB in fp32, which a cache holds. All
of a large layer at once take ten times as long."""

MANY_TOKENS = 16
"""From so many tokens in a group on, factors of blocks are expanded to one for each input: a third
to a half faster on a CPU, for a sixteenth of the inputs' memory."""


def _scale(tensor: Tensor, factor: Tensor, bias: Tensor | None, into: Tensor) -> None:
    """into = bias + factor ∘ tensor, computed in fp32: bf16 rounds a factor of 1.01 to 1.0078.

    Args:
        tensor, into: [groups, tokens, columns]; may be the same.
        factor: [groups, blocks], one for each of equal runs of columns.
    """
    blocks, columns = factor.shape[-1], tensor.shape[-1]
    if tensor.device.type == "cuda" and tensor.is_contiguous() and (fused := _fused(tensor.device)):
        fused(tensor, factor, bias, into)
        return
    factor = factor.unsqueeze(1)
    if blocks not in (1, columns):
        if tensor.device.type == "cpu" and tensor.shape[1] >= MANY_TOKENS:
            factor = factor.unsqueeze(-1).expand(-1, -1, -1, columns // blocks).flatten(2)
        else:
            tensor, into, factor = (
                tensor.unflatten(-1, (blocks, -1)),
                into.unflatten(-1, (blocks, -1)),
                factor.unsqueeze(-1),
            )
    # a CPU would convert all of it first
    by_parts = tensor.device.type == "cpu" and tensor.dtype != factor.dtype
    (_scale_by_parts if by_parts else _scale_at_once)(tensor, factor, bias, into)


@cache
def _fused(device: torch.device) -> Callable[[Tensor, Tensor, Tensor | None, Tensor], None] | None:
    """The kernel for this GPU; None where Triton is not installed, or finds no compiler."""
    try:
        from qzo_diffusion.core.fused_scaling import scale

        one = torch.ones(1, 1, 1, device=device)
        scale(one, one[0], None, one)
    except Exception as error:  # whatever a compiler may say: torch can do the same, only slower
        warnings.warn(
            f"steps take longer than they need to: Triton does not work here ({error})",
            stacklevel=2,
        )
        return None
    return scale


def _scale_at_once(tensor: Tensor, factor: Tensor, bias: Tensor | None, into: Tensor) -> None:
    """Multiply in one pass; a GPU converts dtypes on the way."""
    if bias is None:
        torch.mul(tensor, factor, out=into)
    else:
        torch.addcmul(bias, tensor, factor, out=into)


def _scale_by_parts(tensor: Tensor, factor: Tensor, bias: Tensor | None, into: Tensor) -> None:
    """Multiply part by part, so that each part fits into a cache in fp32."""
    for groups, tokens in _places(tensor):
        wide = tensor[groups, tokens].to(factor.dtype)
        _scale_at_once(wide, factor[groups], bias, into=wide)
        into[groups, tokens].copy_(wide)


def _places(tensor: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of groups and tokens that cover `tensor` in parts of about `AT_ONCE` elements."""
    groups, tokens = tensor.shape[:2]
    of_token = tensor[0, 0].numel()
    groups_at_once, tokens_at_once = (
        max(1, AT_ONCE // (tokens * of_token)),
        max(1, AT_ONCE // of_token),
    )
    for group in range(0, groups, groups_at_once):
        for token in range(0, tokens, tokens_at_once):
            yield slice(group, group + groups_at_once), slice(token, token + tokens_at_once)


class ScaledLayer:
    """Apply one layer's scaling. The layer runs without its bias, which is added after scaling."""

    def __init__(self, name: str, layer_scaling: LayerScaling, bias: Tensor | None) -> None:
        self._name, self._input, self._output, self._overwrites = (
            name,
            layer_scaling.input,
            layer_scaling.output,
            layer_scaling.overwrites,
        )
        self._patch_groups = layer_scaling.patch_groups
        self._bias = None if bias is None else bias.detach()
        if bias is not None and bias.device.type == "cpu" and layer_scaling.output is not None:
            # a GPU converts on its way
            self._bias = bias.detach().to(layer_scaling.output.dtype)
        self.scales_inputs = layer_scaling.input is not None

    def scale_input(self, x: Tensor) -> Tensor:
        """input ∘ x: a new tensor, or x overwritten where no other layer reads it."""
        assert self._input is not None
        groups = len(self._input)
        self._check(x, groups)
        in_place = self._overwrites and x.is_contiguous() and not x.requires_grad
        by_group = x.reshape(groups, -1, x.shape[-1]).contiguous()
        scaled = by_group if in_place else torch.empty_like(by_group)
        _scale(by_group, self._input, None, into=scaled)
        return scaled.view(x.shape)

    def scale_output_(self, output: Tensor) -> None:
        """output ∘ y + bias, in place: a second tensor would cost more time than the product."""
        if self._output is None:
            return
        groups = self._output.shape[0]
        self._check(output, groups)
        y = output.view(groups, -1, output.shape[-1])
        _scale(y, self._output, self._bias, into=y)

    def _check(self, tensor: Tensor, groups: int) -> None:
        first, tokens = tensor.shape[0], tensor.shape[1] if tensor.dim() == 3 else 1
        if first % groups == 0:
            return
        # shorter than the examples are many: the layer ran once for all, or they are packed
        once_for_all = first % (groups // self._patch_groups)
        if once_for_all or groups % first or tokens % (groups // first):
            raise ModelError(
                f"{self._name} runs on a first dimension of {first}, of {tokens} tokens "
                f"each, where {groups} groups are probed",
                "groups of whole examples, or of equally long runs of an example's tokens",
                "use parametrization dense, or a model that keeps examples apart in its first "
                "dimension; or qzo.regions=1",
            )


def bias_beside(scaling: LayerScaling, layer: nn.Module, name: str) -> nn.Parameter | None:
    """The bias that a layer runs without while its output is scaled; None where there is none, or
    inputs alone are scaled.

    Raises:
        ModelError: a bias that can't be taken off: it would be scaled with the output.
    """
    if scaling.output is None or layer.bias is None:
        return None
    bias = layer.bias
    if isinstance(bias, nn.Parameter):
        return bias
    raise ModelError(
        f"{name} has a bias that is a {type(bias).__name__}",
        "an nn.Parameter, or None",
        "register it as a parameter",
    )


def without_bias(bias: nn.Parameter) -> nn.Parameter | None:
    """The parameter that stands in for a bias while the layer's activations are scaled.

    Zeros on a CPU in 16 bits: without a bias torch's product takes another path, whose buffers
    leave holes as large as a weight in the heap (130 MB more on SD3.5 Large, for 1 % of the time).
    """
    zeros = bias.device.type == "cpu" and bias.dtype in (torch.bfloat16, torch.float16)
    return nn.Parameter(torch.zeros_like(bias), False) if zeros else None
