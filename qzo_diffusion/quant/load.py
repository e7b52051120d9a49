"""Turn the linears of any diffusers or transformers model into 4-bit layers, and find the scales of one that already has them."""

from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.core.scales import ScaleHandle, ScaleSet
from qzo_diffusion.quant import aqlm, base, bnb, gptq, int8, reference
from qzo_diffusion.quant.base import Backend, QuantType

# gptqmodel's and AQLM's own: some repack codes or keep copies of the scales in their first forward.
FOREIGN = ("TorchLinear", "TorchAtenLinear", "TorchFusedLinear", "TorchCpuAvx512Linear", "QuantizedLinear", "HQQLinear")


class CodedHandle(ScaleHandle, Protocol):
    @property
    def codes(self) -> Tensor: ...

    def dequantized(self) -> Tensor:
        """The weight [N, K] at the scales that are shown."""
        ...


def quantize_(
    model: nn.Module,
    *,
    quant_type: QuantType | Literal["int8"] = "nf4",
    blocksize: int = 64,
    skip: Sequence[str] = (),
    backend: Backend = "bnb",
    device: torch.device | str = "cpu",
) -> int:
    """Quantize every linear outside `skip` in place, layer by layer, without a GPU. Returns the number of layers.

    "int8" is LLM.int8 with a scale per output; it has no block size and no other back-end.
    """
    target = torch.device(device)
    if quant_type == "int8":
        return base.replace_linears_(model, lambda linear: int8.quantize_linear(linear, target), skip, blocksize=1)

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
            int8.prepare_(module, name)
            yield int8.Int8Handle(name, module)
        elif kind == "GptqLinear":
            yield gptq.GptqHandle(name, module)
        elif kind == "AqlmLinear":
            yield aqlm.AqlmHandle(name, module)
        elif kind in FOREIGN:
            raise ModelError(
                f"{name} is a layer {kind} of another program, which may not see changed scales",
                "layers that this program reads itself",
                "give the model's folder to `qzo-diffuse llm`, or load it with 4-bit quantization of bitsandbytes",
            )


def find_scales(model: nn.Module) -> ScaleSet:
    """The scales of all quantized layers of `model`."""
    return ScaleSet(handles_of(model))


def codes_fingerprint(model: nn.Module) -> str:
    """Identifies the frozen half of a quantized model; tuned scales only fit the codes that they were tuned with."""
    return base.fingerprint((handle.name, handle.codes) for handle in handles_of(model))
