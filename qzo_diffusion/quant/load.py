"""Quantizes the linears of any diffusers or transformers model, and finds the scales of one."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.core.scales import ScaleHandle, ScaleSet
from qzo_diffusion.core.weights import WeightHandle
from qzo_diffusion.quant import (
    aqlm,
    base,
    bnb,
    branched,
    gguf,
    gptq,
    hqq,
    int8,
    intgrid,
    reference,
    svdquant,
)
from qzo_diffusion.quant.base import Backend, PlainType

# Layers of other programs. Some repack codes or copy the scales in their first forward.
FOREIGN = (
    "TorchLinear",
    "TorchAtenLinear",
    "TorchFusedLinear",
    "TorchCpuAvx512Linear",
    "QuantizedLinear",
    "HQQLinear",
    "GgufLinear",
)


# transformers has a GgufLinear too
OWN = (
    intgrid.IntGridLinear,
    gptq.GptqLinear,
    aqlm.AqlmLinear,
    hqq.HqqLinear,
    gguf.GgufLinear,
    branched.ScaledRows,
)
AnyType = PlainType | intgrid.GridType


class CodedHandle(ScaleHandle, Protocol):
    @property
    def codes(self) -> Tensor: ...

    def dequantized(self) -> Tensor:
        """The weight [N, K] at the scales that are shown."""
        ...


def quantize_(
    model: nn.Module,
    *,
    quant_type: AnyType = "nf4",
    blocksize: int = 64,
    skip: Sequence[str] = (),
    backend: Backend = "bnb",
    activations: intgrid.Activations = "float",
    device: torch.device | str = "cpu",
) -> int:
    """Quantize every linear outside `skip` in place. Returns the number of layers.

    "int8" of the back-end bnb is LLM.int8 with a scale per output. int8 and fp8 have no block size.
    """
    target = torch.device(device)
    if backend == "intgrid":
        grid_type: Any = quant_type

        def make_grid_layer(linear: nn.Linear) -> nn.Module:
            return intgrid.quantize_linear(linear.to(target), grid_type, blocksize, activations)

        return base.replace_linears_(
            model, make_grid_layer, skip, intgrid.columns_of_block(grid_type, blocksize)
        )
    if quant_type == "int8":
        return base.replace_linears_(
            model, lambda linear: int8.quantize_linear(linear, target), skip, blocksize=1
        )

    plain: Any = quant_type

    def make_layer(linear: nn.Linear) -> nn.Module:
        if backend == "reference":
            return plain_layer(linear.to(target), plain, blocksize, activations)
        return bnb.quantize_linear(linear, plain, blocksize, target)

    return base.replace_linears_(model, make_layer, skip, blocksize)


def plain_layer(
    linear: nn.Linear,
    quant_type: PlainType,
    blocksize: int,
    activations: intgrid.Activations = "float",
    peaks: Tensor | None = None,
) -> nn.Module:
    """A layer of the back-end "reference" with the weights of `linear`, where they are.

    Args:
        peaks: of the inputs, for svdquant.
    """
    if quant_type != "svdquant":
        return reference.ReferenceLinear4bit.from_linear(linear, quant_type, blocksize)
    rounds = activations == "int4"
    return svdquant.quantized_layer(
        linear.weight, linear.bias, blocksize, rounds_inputs=rounds, peaks=peaks
    )


def handles_of(model: nn.Module) -> Iterator[CodedHandle]:
    """One handle per quantized layer, recognised by its class; layers of bitsandbytes are made safe
    on the way.

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
        elif isinstance(module, OWN):
            yield base.OwnLayerHandle(name, module)
        elif kind in FOREIGN:
            raise ModelError(
                f"{name} is a layer {kind} of another program, which may not see changed scales",
                "layers that this program reads itself",
                "give the model's folder to `qzo-diffuse llm`, or load it with 4-bit "
                "quantization of bitsandbytes",
            )


def find_scales(model: nn.Module, beside: Sequence[WeightHandle] = ()) -> ScaleSet:
    """The scales of all quantized layers of `model`, and unquantized tensors of it; modules that
    follow each other lie together.
    """
    place = {id(module): index for index, module in enumerate(model.modules())}
    return ScaleSet(
        sorted([*handles_of(model), *beside], key=lambda handle: place[id(handle.module)])
    )


def find_codes(model: nn.Module) -> tuple[ScaleSet, dict[str, intgrid.Int8Grid]]:
    """The codes of all layers on a grid, in the place of scales, and how each layer stores them.

    Raises:
        ModelError: other quantized layers; their codes are entries of a codebook and have no
            neighbours to move to.
    """
    handles = list(intgrid.codes_handles(model))
    if not handles:
        raise ModelError(
            "a model without layers on an integer grid",
            "quant.backend=intgrid",
            "set it, or train the scales",
        )
    return ScaleSet(handles, dtypes=(torch.int8, torch.uint8)), {
        handle.name: handle.grid for handle in handles
    }


def frozen_fingerprint(model: nn.Module, trained: ScaleSet) -> str:
    """Identifies what is not trained: the codes, or the scales where the codes are trained."""
    if all(tensor.is_floating_point() for tensor in trained.tensors().values()):
        return codes_fingerprint(model)
    return base.fingerprint((handle.name, handle.scales) for handle in handles_of(model))


def codes_fingerprint(model: nn.Module) -> str:
    """Identifies a model's codes; tuned scales fit only the codes that they were tuned with."""
    return base.fingerprint((handle.name, handle.codes) for handle in handles_of(model))
