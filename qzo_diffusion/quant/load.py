"""Turn the linears of any diffusers or transformers model into 4-bit layers, and find the scales of one that already has them."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.core.scales import ScaleHandle, ScaleSet
from qzo_diffusion.quant import base, bnb, reference
from qzo_diffusion.quant.base import Backend, QuantType


class CodedHandle(ScaleHandle, Protocol):
    @property
    def codes(self) -> Tensor: ...

    def dequantized(self) -> Tensor:
        """The weight [N, K] at the scales that are shown."""
        ...


def quantize_(
    model: nn.Module,
    *,
    quant_type: QuantType = "nf4",
    blocksize: int = 64,
    skip: Sequence[str] = (),
    backend: Backend = "bnb",
    device: torch.device | str = "cpu",
) -> int:
    """Quantize every linear outside `skip` in place, layer by layer, without a GPU. Returns the number of layers."""
    target = torch.device(device)

    def make_layer(linear: nn.Linear) -> nn.Module:
        if backend == "reference":
            return reference.ReferenceLinear4bit.from_linear(linear, quant_type, blocksize).to(target)
        return bnb.quantize_linear(linear, quant_type, blocksize, target)

    return base.replace_linears_(model, make_layer, skip, blocksize)


def handles_of(model: nn.Module) -> Iterator[CodedHandle]:
    """One handle per quantized layer, recognised by its class; layers of bitsandbytes are made safe on the way.

    Raises:
        ModelError: a quantized layer that cannot be tuned; the message names it.
    """
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind == "Linear4bit":
            bnb.prepare_(module, name)
            yield bnb.BnbHandle(name, module)
        elif kind == "ReferenceLinear4bit":
            yield reference.ReferenceHandle(name, module)
        elif kind == "Linear8bitLt":
            raise ModelError(f"{name} is an 8-bit layer", "4-bit layers", "load the model with 4-bit quantization")


def find_scales(model: nn.Module) -> ScaleSet:
    """The scales of all quantized layers of `model`."""
    return ScaleSet(handles_of(model))


def codes_fingerprint(model: nn.Module) -> str:
    """Identifies the frozen half of a quantized model; tuned scales only fit the codes that they were tuned with."""
    return base.fingerprint((handle.name, handle.codes) for handle in handles_of(model))
