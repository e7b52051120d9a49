"""Read language models that are stored in the formats of GPTQ, AQLM and HQQ into our own layers,
and save them again.

The code for these formats is in `quant`. The programs that write them are not imported.
"""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.core.scales import ScaleSet
from qzo_diffusion.quant import aqlm, gptq, hqq
from qzo_diffusion.quant.fits import refuse_kin
from qzo_diffusion.quant.gguf_header import is_gguf
from qzo_diffusion.quant.json_file import read_object
from qzo_diffusion.quant.patch import patch_folder
from qzo_diffusion.quant.weights import read_entries
from qzo_diffusion.quant.without_weights import without_weights

_FORMATS: Mapping[str, Any] = {"gptq": gptq, "aqlm": aqlm, "hqq": hqq}
READ_HERE = tuple(_FORMATS)
MakeLayer = Callable[[str, Mapping[str, Tensor], Tensor | None], nn.Module]
INNER = ".inner"  # part of a GPTQ layer that permutes its inputs


def stored_method(folder: Path) -> str | None:
    """Return `quant_method` of config.json, or "gguf"; None for a model that is not quantized on
    disk.
    """
    if is_gguf(folder):
        return "gguf"
    method = _quantization(folder).get("quant_method")
    return None if method is None else str(method)


def empty_causal_lm(folder: Path, dtype: torch.dtype) -> nn.Module:
    """Build the unquantized model of a folder's config, with its weights on the meta device.

    Only JSON files are read.

    Raises:
        ModelError: transformers refuses the config.
    """
    try:
        return _empty_causal_lm(folder, dtype)
    except Exception as error:  # a wrong value may raise anything in transformers
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"{folder} can't be loaded: {reason}",
            "a causal language model",
            "check its config.json, or download it again",
        ) from error


def _empty_causal_lm(folder: Path, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with without_weights():
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    if (folder / "generation_config.json").is_file():  # where an answer ends
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model


def load_stored(folder: Path, dtype: torch.dtype) -> nn.Module:
    """Load the model with a layer of ours wherever the checkpoint has codes, in `dtype` elsewhere.

    Raises:
        ModelError: other than 4 bits, parts that don't fit together, or missing weights.
    """
    settings, method = _quantization(folder), stored_method(folder)
    if method == "gptq" and settings.get("bits") != gptq.BITS:
        raise ModelError(
            f"GPTQ of {settings.get('bits')} bits",
            "4 bits",
            "use a model of 4 bits, or quantize it to NF4",
        )
    model: Any = empty_causal_lm(folder, dtype)
    tensors = _read(folder)
    parts = _FORMATS[str(method)].PARTS
    names = [name.removesuffix(f".{parts[0]}") for name in tensors if name.endswith(f".{parts[0]}")]
    if not names:
        raise ModelError(
            f"{folder} without a layer of {method}",
            f"tensors named *.{parts[0]}",
            "download the model again",
        )
    states = {
        name: {part: tensors.pop(f"{name}.{part}") for part in parts if f"{name}.{part}" in tensors}
        for name in names
    }
    make_layer = _layer_maker(str(method), states, settings.get("checkpoint_format"), dtype)
    for name, state in states.items():
        bias = tensors.pop(f"{name}.bias", None)
        layer = make_layer(name, state, None if bias is None else bias.to(dtype))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    floats = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    result = model.load_state_dict(floats, strict=False, assign=True)
    unused = [name for name in result.unexpected_keys if not _describes(name, tensors, method)]
    refuse_kin(unused, model.state_dict().keys() | states.keys(), model)
    model.tie_weights()
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise ModelError(
            f"{folder} without {missing[0]}", "all weights of the model", "download the model again"
        )
    return model


def _describes(name: str, tensors: Mapping[str, Tensor], method: str | None) -> bool:
    """Return whether a tensor beside a layer has no influence on its weight."""
    part = name.rpartition(".")[2]
    if method != "hqq":
        return False
    return part in hqq.DESCRIPTION or (part in hqq.FLAGS and not tensors[name].any())


def _layer_maker(
    method: str, states: Mapping[str, Mapping[str, Tensor]], label: str | None, dtype: torch.dtype
) -> MakeLayer:
    if method == "gptq":
        version = gptq.version_of({name: state["qzeros"] for name, state in states.items()}, label)
        return lambda name, state, bias: gptq.layer_from_state(name, state, bias, version)
    if method == "aqlm":
        return lambda name, state, bias: aqlm.layer_from_state(
            name, _floats(state, "codebooks", dtype), bias
        )
    return hqq.layer_from_state


def _floats(state: Mapping[str, Tensor], part: str, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) if name == part else tensor for name, tensor in state.items()}


def save_stored(
    source: Path,
    target: Path,
    scales: ScaleSet | Mapping[str, Tensor],
    weights: Collection[str] = frozenset(),
) -> None:
    """Copy the folder `source` with these scales, rounded to the dtype of the checkpoint.

    Args:
        weights: the names in `scales` that are unquantized tensors.
    """
    stored: Any = _FORMATS[str(stored_method(source))]
    tensors = scales.tensors() if isinstance(scales, ScaleSet) else scales

    def entry(name: str, tensor: Tensor) -> tuple[str, Tensor]:
        if name in weights:
            return name.replace(f"{INNER}.", "."), tensor
        return f"{name.removesuffix(INNER)}.{stored.STORED}", stored.scales_to_store(tensor)

    patch_folder(source, target, dict(entry(name, tensor) for name, tensor in tensors.items()))


def bitsandbytes_type(folder: Path) -> str:
    """Return the type of a bitsandbytes folder: "nf4", "int8", or "fp4", which is its default."""
    settings = _quantization(folder)
    return (
        str(settings.get("bnb_4bit_quant_type", "fp4")) if settings.get("load_in_4bit") else "int8"
    )


def _quantization(folder: Path) -> dict[str, Any]:
    content = read_object(folder / "config.json", "the config of a model")
    found = content.get("quantization_config") or {}
    return found if isinstance(found, dict) else {}


def _read(folder: Path) -> dict[str, Tensor]:
    return {name: entry.read() for name, entry in read_entries(folder).items()}
