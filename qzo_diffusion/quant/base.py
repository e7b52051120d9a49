"""The interface of a quantization back-end, and the loop that quantizes a model layer by layer.

A back-end is one file with a class that satisfies `core.scales.ScaleHandle`. The class returns the
live scale tensor of a layer and sets another one for a forward. Every back-end computes
`x [..., K] -> y [..., N]` for a weight [N, K]."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qzo_diffusion.core.errors import ModelError

QuantType = Literal["nf4", "fp4"]
CodebookType = QuantType | Literal["bof4", "bof4s"]
PlainType = CodebookType | Literal["svdquant"]  # of the back-end "reference"
Backend = Literal["bnb", "reference", "intgrid"]
MakeLayer = Callable[[nn.Linear], nn.Module]


@dataclass(frozen=True)
class OwnLayerHandle:
    """The handle of our own layers, which have `scales`, `codes` and `dequantized`."""

    name: str
    module: Any

    @property
    def scales(self) -> Tensor:
        return self.module.scales

    @property
    def codes(self) -> Tensor:
        return self.module.codes

    def dequantized(self) -> Tensor:
        """The weight [N, K] at the scales that are shown."""
        result: Tensor = self.module.dequantized()
        return result

    def override(self, scales: Tensor) -> None:
        self.module.scales = scales


def is_skipped(name: str, skip: Sequence[str]) -> bool:
    """True when a part of the dotted module name is in `skip`, or the name starts with an entry
    that has dots itself.
    """
    parts = name.split(".")
    return any(entry in parts or name == entry or name.startswith(entry + ".") for entry in skip)


def linears_to_quantize(
    model: nn.Module, skip: Sequence[str], blocksize: int
) -> Iterator[tuple[str, nn.Linear]]:
    """Plain linears outside `skip` whose rows are whole blocks.

    Blocks that cross rows are refused, not quantized: bitsandbytes' CPU kernel dequantizes them
    wrongly (13-30 % error)."""
    for name, module in model.named_modules():
        if (
            type(module) is nn.Linear
            and not is_skipped(name, skip)
            and module.in_features % blocksize == 0
        ):
            yield name, module


def replace_linears_(
    model: nn.Module, make_layer: MakeLayer, skip: Sequence[str], blocksize: int
) -> int:
    """Quantize layer by layer; each float weight is freed before the next layer.

    Returns the number of layers.

    Raises:
        ModelError: nothing could be quantized.
    """
    chosen = [name for name, _ in linears_to_quantize(model, skip, blocksize)]
    for name in chosen:
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        setattr(parent, child, make_layer(parent.get_submodule(child)))  # type: ignore[arg-type]
    if not chosen:
        raise nothing_to_quantize(skip, blocksize, model)
    return len(chosen)


def nothing_to_quantize(
    skip: Sequence[str], blocksize: int, model: nn.Module | None = None
) -> ModelError:
    """The error for a model without a layer to quantize."""
    if model is not None and any(type(one).__name__ == "Conv1D" for one in model.modules()):
        return ModelError(
            f"{type(model).__name__}, whose layers are Conv1D and not nn.Linear",
            "a model of nn.Linear layers, such as Llama, Qwen, SmolLM2, OPT or GPT-NeoX",
            "use another model",
        )
    return ModelError(
        f"no linear layer whose width is a multiple of {blocksize} outside {list(skip)}",
        "at least one layer to quantize",
        "choose a smaller quant.blocksize or a shorter quant.skip",
    )


def fingerprint(named: Iterable[tuple[str, Tensor]]) -> str:
    """blake2b over names, shapes and bytes of tensors; equal for equal codes."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(named):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
