"""Language models that are quantized on disk in the formats of GPTQ and AQLM, read by our own layers; and saved again.

Everything that these formats need beside the package is in `quant`: neither gptqmodel nor aqlm is imported.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.core.scales import ScaleSet
from qzo_diffusion.quant import aqlm, gptq
from qzo_diffusion.quant.patch import patch_folder

READ_HERE = ("gptq", "aqlm")
INNER = ".inner"  # of a GPTQ layer whose inputs are put in order


def stored_method(folder: Path) -> str | None:
    """`quant_method` of config.json: how the model is quantized on disk."""
    method = _quantization(folder).get("quant_method")
    return None if method is None else str(method)


def load_stored(folder: Path, dtype: torch.dtype) -> nn.Module:
    """The model with a layer of ours wherever the checkpoint has codes, in `dtype` elsewhere.

    Raises:
        ModelError: a format of other than 4 bits, parts that don't fit together, or weights that are missing.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    settings, method = _quantization(folder), stored_method(folder)
    if method == "gptq" and settings.get("bits") != gptq.BITS:
        raise ModelError(f"GPTQ of {settings.get('bits')} bits", "4 bits", "use a model of 4 bits, or quantize it to NF4")
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    tensors = _read(folder)
    parts = gptq.PARTS if method == "gptq" else aqlm.PARTS
    names = [name.removesuffix(f".{parts[0]}") for name in tensors if name.endswith(f".{parts[0]}")]
    if not names:
        raise ModelError(f"{folder} without a layer of {method}", f"tensors named *.{parts[0]}", "download the model again")
    states = {name: {part: tensors.pop(f"{name}.{part}") for part in parts if f"{name}.{part}" in tensors} for name in names}
    version = (
        gptq.version_of({name: state["qzeros"] for name, state in states.items()}, settings.get("checkpoint_format"))
        if (method == "gptq")
        else 1
    )
    for name, state in states.items():
        bias = tensors.pop(f"{name}.bias", None)
        bias = None if bias is None else bias.to(dtype)
        layer: nn.Module
        if method == "gptq":
            layer = gptq.layer_from_state(name, state, bias, version)
        else:
            layer = aqlm.layer_from_state(name, state | {"codebooks": state["codebooks"].to(dtype)}, bias)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    floats = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    model.load_state_dict(floats, strict=False, assign=True)
    model.tie_weights()
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise ModelError(f"{folder} without {missing[0]}", "all weights of the model", "download the model again")
    return model


def save_stored(
    source: Path, target: Path, scales: ScaleSet | Mapping[str, Tensor], weights: Collection[str] = frozenset()
) -> None:
    """A copy of the folder `source` with these scales, rounded to the dtype that the checkpoint has.

    Args:
        weights: names in `scales` of what is no scale but an unquantized tensor.
    """
    to_store = gptq.scales_to_store if stored_method(source) == "gptq" else aqlm.scales_to_store
    tensors = scales.tensors() if isinstance(scales, ScaleSet) else scales

    def entry(name: str, tensor: Tensor) -> tuple[str, Tensor]:
        if name in weights:
            return name.replace(f"{INNER}.", "."), tensor
        return f"{name.removesuffix(INNER)}.scales", to_store(tensor)

    patch_folder(source, target, dict(entry(name, tensor) for name, tensor in tensors.items()))


def _quantization(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}/config.json can't be read: {error}", "JSON", "download the model again") from None
    return found if isinstance(found, dict) else {}


def _read(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            tensors |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    return tensors
