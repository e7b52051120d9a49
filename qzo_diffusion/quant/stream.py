"""Fills an empty model tensor by tensor from disk and quantizes each linear as it arrives.

Memory holds the layers quantized so far and one tensor as it is on disk, so loading takes no more
than the 4-bit model. Models of diffusers and of transformers are loaded alike. Layers that are
4-bit on disk (bitsandbytes' layout) keep their codes; nested scales are un-nested. Layers in the
blocks of a GGUF file or in SDNQ's codes stay in them, and then no other layer is quantized."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.quant import base, bnb, fits, gguf, intgrid, reference, sdnq, svdquant
from qzo_diffusion.quant.base import Backend, PlainType
from qzo_diffusion.quant.entries import Entry


@dataclass(frozen=True)
class Quantization:
    """Settings for quantizing linears; layers that are quantized on disk keep their own type and
    block size.
    """

    quant_type: PlainType | intgrid.GridType = "nf4"
    blocksize: int = 64
    skip: Sequence[str] = ()
    backend: Backend = "bnb"
    activations: intgrid.Activations = "float"

    @property
    def columns(self) -> int:
        """The inputs of a layer must be a multiple of this."""
        if self.backend != "intgrid":
            return self.blocksize
        return intgrid.columns_of_block(self.quant_type, self.blocksize)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Filled:
    """Counts of layers quantized on arrival and of layers that were quantized on disk, and the
    names that the model has no place for.
    """

    quantized: int
    taken_over: int
    unused: list[str] = field(default_factory=list)


def fill_(
    model: nn.Module,
    entries: Mapping[str, Entry],
    quantization: Quantization | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int], object] = lambda nbytes: None,
) -> Filled:
    """Read `entries` into `model`, in the order in which they lie on disk.

    Args:
        model: parameters on the meta device, names as in `entries`; weights that it ties
            (`all_tied_weights_keys` of transformers) may be absent.
        quantization: None leaves everything as it is, apart from layers that are quantized on disk.
        dtype: of everything that is not quantized, and of products.
        progress: called with the bytes of each tensor that was read.

    Raises:
        ModelError: a tensor is missing, of another shape or belongs to one that is used, a file is
            damaged, or nothing could be quantized.
    """
    named = fits.named_as_in(model, entries)
    unused = fits.check_fits(model, named)
    filler = _Filler(model, named, quantization, dtype, device)
    for name in sorted(filler.entries, key=lambda name: _place(filler.entries[name])):
        beside = bnb.belongs_to_a_weight(name, filler.entries) or sdnq.belongs_to_a_weight(
            name, filler.entries
        )
        if not beside:
            filler.arrive(name)
        progress(filler.entries[name].nbytes)
    filler.finish()
    return Filled(filler.quantized, filler.taken_over, sorted(unused))


class _Filler:
    def __init__(
        self,
        model: nn.Module,
        entries: Mapping[str, Entry],
        how: Quantization | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.model, self.entries, self._how, self._dtype, self._device = (
            model,
            entries,
            how,
            dtype,
            device,
        )
        self._to_quantize = (
            {name for name, _ in base.linears_to_quantize(model, how.skip, how.columns)}
            if how and not any(_is_kept(entry) for entry in entries.values())
            else set()
        )
        self._slots = fits.slots_of(model).keys()
        self._tied = fits.tied_targets(model, entries)
        self.quantized = self.taken_over = 0

    def arrive(self, name: str) -> None:
        targets = [target for target in (name, *self._tied.get(name, ())) if target in self._slots]
        if not targets:
            return
        layer = name.removesuffix(".weight")
        state = bnb.stored_state(layer, self.entries) if name.endswith(".weight") else {}
        if state:
            self._take_over(layer, {key: entry.read() for key, entry in state.items()})
            return
        if self.entries[name].blocks and targets == [name] and self._is_linear(name):
            self._take_blocks(layer, self.entries[name])
            return
        if self.entries[name].rotation is not None:
            self._take_codes(layer)
            return
        whole = self.entries[name].read()
        kept: nn.Parameter | None = None
        for target in targets:
            if target.removesuffix(".weight") in self._to_quantize and target.endswith(".weight"):
                self._quantize(target.removesuffix(".weight"), whole)
            else:
                kept = self._keep(target, whole, kept)

    def _quantize(self, layer: str, weight: Tensor) -> None:
        assert self._how is not None
        linear = self.model.get_submodule(layer)
        how, weight = self._how, weight.to(self._device, self._dtype)
        made: nn.Module
        kind: Any = how.quant_type
        bias: Any = linear.bias
        if how.backend == "intgrid":
            made = intgrid.IntGridLinear(
                *intgrid.quantize(weight, kind, how.blocksize), bias, kind, how.activations
            )
        elif kind == "svdquant":
            rounds = how.activations == "int4"
            made = svdquant.quantized_layer(weight, bias, how.blocksize, rounds_inputs=rounds)
        elif how.backend == "reference":
            codes, absmax = reference.quantize_blockwise(weight, kind, how.blocksize)
            made = reference.ReferenceLinear4bit(codes, absmax, bias, kind, how.blocksize)
        else:
            made = bnb.quantized_layer(weight, bias, kind, how.blocksize)
        _replace(self.model, layer, made)
        self.quantized += 1

    def _is_linear(self, name: str) -> bool:
        parent, _, child = name.rpartition(".")
        return child == "weight" and isinstance(self.model.get_submodule(parent), nn.Linear)

    def _take_blocks(self, layer: str, entry: Entry) -> None:
        codes, kind = entry.read_blocks().to(self._device), str(entry.blocks)
        bias: Any = self.model.get_submodule(layer).bias
        _replace(self.model, layer, gguf.GgufLinear(codes, kind, None, bias))
        self.taken_over += 1

    def _take_codes(self, layer: str) -> None:
        state = sdnq.stored_state(layer, self.entries)
        rotation, linear = self.entries[f"{layer}.weight"].rotation, self.model.get_submodule(layer)
        made = sdnq.layer_from_state(layer, state, rotation or 0, linear, self._device)
        _replace(self.model, layer, made)
        self.taken_over += 1

    def _take_over(self, layer: str, state: dict[str, Tensor]) -> None:
        linear: Any = self.model.get_submodule(layer)
        made = bnb.layer_from_state(layer, state, linear.bias, self._dtype, self._device)
        if (made.out_features, made.in_features) != (linear.out_features, linear.in_features):
            got = f"{layer} has {made.in_features} inputs and {made.out_features} outputs"
            raise ModelError(
                got,
                f"{linear.in_features} and {linear.out_features}",
                "give weights and config of one model",
            )
        if self._how and self._how.backend == "reference":
            made = reference.ReferenceLinear4bit.from_packed(*bnb.parts_of(made), linear.bias)
        _replace(self.model, layer, made)
        self.taken_over += 1

    def _keep(
        self, target: str, tensor: Tensor, shared: nn.Parameter | None
    ) -> nn.Parameter | None:
        """Into its place in the model; tied weights are one parameter."""
        parent, _, child = target.rpartition(".")
        module = self.model.get_submodule(parent)
        if child in module._buffers:
            module._buffers[child] = self._cast(tensor)
            return shared
        kept = nn.Parameter(self._cast(tensor), requires_grad=False) if shared is None else shared
        module._parameters[child] = kept
        return kept

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, self._dtype if tensor.is_floating_point() else None)

    def finish(self) -> None:
        """Raises ModelError when something is missing, or nothing was quantized."""
        left = [name for name, tensor in fits.slots_of(self.model).items() if tensor.is_meta]
        if left:
            raise fits.missing_error(left)
        for buffer_name, buffer in list(self.model.named_buffers()):
            parent, _, child = buffer_name.rpartition(".")
            self.model.get_submodule(parent)._buffers[child] = buffer.to(self._device)
        if self._how is not None and not self.quantized + self.taken_over:
            raise base.nothing_to_quantize(self._how.skip, self._how.columns, self.model)
        self.model.eval().requires_grad_(False)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _is_kept(entry: Entry) -> bool:
    return entry.blocks is not None or entry.rotation is not None


def _place(entry: Entry) -> tuple[str, int]:
    return str(entry.spans[0].file), entry.spans[0].start
