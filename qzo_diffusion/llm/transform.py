"""Maps of the inputs of a language model's layers that leave what it computes as it is.

The weights that are read take their part of the maps tensor by tensor, before they are quantized.
What no weight can take is applied in the forward pass."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qzo_diffusion.llm import decoder as parts
from qzo_diffusion.llm.decoder import Decoder
from qzo_diffusion.quant.entries import Entry
from qzo_diffusion.quant.kronecker import KroneckerMap, OnlineMap, rotation

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Online:
    """A map that is applied in the forward pass, to what a module takes or gives."""

    one: KroneckerMap
    at: Literal["input", "output"] = "input"
    back: bool = False


@dataclass(frozen=True)
class Transform:
    """Maps by names of modules.

    inputs: T⁻ᵀ of a linear's inputs, which its weight takes. outputs: T of what a linear or an
    embedding gives, which its weight and bias take. gains: linear of `inputs` -> the norm before
    it, whose gain its weight takes. online: what is left for the forward pass.
    """

    inputs: Mapping[str, KroneckerMap] = field(default_factory=dict)
    outputs: Mapping[str, KroneckerMap] = field(default_factory=dict)
    gains: Mapping[str, str] = field(default_factory=dict)
    online: Mapping[str, Online] = field(default_factory=dict)


@dataclass(frozen=True)
class ChangedEntry(Entry):
    """A tensor on disk that is changed when it is read."""

    change: Change = torch.Tensor.clone

    def read(self) -> Tensor:
        return self.change(super().read())


def rotated(
    sizes: Decoder, residual: KroneckerMap, heads: list[Tensor], inner: KroneckerMap
) -> Transform:
    """Rotations of a whole decoder (QuaRot, arXiv 2404.00456; SpinQuant's R1, R2 and R4).

    The residual stream is rotated by what writes to it and read by weights that took over the gains
    of the norms. Values are rotated head by head by the projections before and after. The input of
    the feed-forward's last layer, which comes out of a product, is rotated in the forward pass.
    Embedding and head take the rotation where each has a weight of its own; a weight that both
    share stays, and the forward pass rotates behind the embedding and back before the last norm.

    Args:
        residual: an orthogonal map of `width` numbers.
        heads: an orthogonal matrix [head, head] for each block.
        inner: a map of `inner` numbers.
    """
    inputs, outputs = dict[str, KroneckerMap](), dict[str, KroneckerMap]()
    gains, online = dict[str, str](), dict[str, Online]()
    read, down = residual.dual(), inner.dual()
    for name, own in zip(sizes.names(), heads, strict=True):
        for norm, layers in parts.NORMS.items():
            gains |= {f"{name}.{layer}": f"{name}.{norm}" for layer in layers}
            inputs |= {f"{name}.{layer}": read for layer in layers}
        outputs[f"{name}.{parts.VALUES}"] = rotation(own, sizes.value_heads)
        inputs[f"{name}.{parts.OUT_OF_ATTENTION}"] = rotation(own, sizes.query_heads).dual()
        inputs[f"{name}.{parts.OUT_OF_MLP}"] = down
        online[f"{name}.{parts.OUT_OF_MLP}"] = Online(inner)
        for layer in (parts.OUT_OF_ATTENTION, parts.OUT_OF_MLP):
            outputs[f"{name}.{layer}"] = residual
    if sizes.tied:
        online[parts.EMBEDDING] = Online(residual, at="output")
        online[parts.LAST_NORM] = Online(residual, back=True)
    else:
        outputs[parts.EMBEDDING] = residual
        gains[parts.HEAD], inputs[parts.HEAD] = parts.LAST_NORM, read
    return Transform(inputs, outputs, gains, online)


def transformed_entries(entries: Mapping[str, Entry], transform: Transform) -> dict[str, Entry]:
    """Return the tensors of a model, by its own names, with their part of the maps."""
    norms = dict.fromkeys(transform.gains.values())  # several layers take the gain of one
    gains = {norm: entries[f"{norm}.weight"].read().double() for norm in norms}
    found = dict(entries)
    for norm in gains:
        found[f"{norm}.weight"] = _changed(entries[f"{norm}.weight"], torch.ones_like)
    for name in {*transform.inputs, *transform.outputs}:
        before, after = transform.inputs.get(name), transform.outputs.get(name)
        if before is not None and name in transform.gains:
            before = replace(before, scale=before.scale * gains[transform.gains[name]])
        weight, bias = f"{name}.weight", f"{name}.bias"
        if name == parts.EMBEDDING:  # whose rows are what it gives
            before, after = after, None
        found[weight] = _changed(entries[weight], _change_of(before, after))
        if after is not None and bias in entries:
            found[bias] = _changed(entries[bias], _of_bias(after))
    return found


def install_(model: nn.Module, transform: Transform, dtype: torch.dtype) -> None:
    """Let the forward passes of `model` apply what no weight took, in fp32 or wider."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name, online in transform.online.items():
        module = model.get_submodule(name)
        applied = OnlineMap(online.one, online.back, wide).to(_device_of(module))
        module.add_module("online", applied)
        if online.at == "input":
            module.register_forward_pre_hook(_map_input)
        else:
            module.register_forward_hook(_map_output)


def _map_input(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (module.online(args[0]), *args[1:])


def _map_output(module: Any, _args: tuple[Any, ...], output: Tensor) -> Tensor:
    mapped: Tensor = module.online(output)
    return mapped


def _device_of(module: nn.Module) -> torch.device:
    tensors = [*module.parameters(), *module.buffers()]
    return tensors[0].device


def _changed(entry: Entry, change: Change) -> ChangedEntry:
    return ChangedEntry(**vars(entry), change=change)


def _change_of(before: KroneckerMap | None, after: KroneckerMap | None) -> Change:
    """The change of a weight [N, K]: a map of its rows, then one of its columns."""

    def change(weight: Tensor) -> Tensor:
        found = weight if before is None else before.of_rows(weight)
        return found if after is None else after.of_rows(found.T.contiguous()).T.contiguous()

    return change


def _of_bias(after: KroneckerMap) -> Change:
    return lambda bias: after.of(bias.double()).to(bias.dtype)
