"""Read a language model from one GGUF file with a layer of ours for every quantized linear, and
save it again for llama.cpp.

Transformers reads configuration, tokenizer and all unquantized tensors; it dequantizes the whole
file. Each of our layers is then compared with its result. So a layer under another name, or rows in
another order, are not tuned by mistake.
"""

import shutil
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.quant import gguf as blocks
from qzo_diffusion.quant.describe import gguf_of_pictures
from qzo_diffusion.quant.fits import check_loaded
from qzo_diffusion.quant.gguf_header import check_whole, read_gguf_header
from qzo_diffusion.quant.load import handles_of

TOKENS = "token_embd.weight"  # GGUF shapes have rows last
LIKE = 2**-6  # relative difference that rounding to 16 bits may cause, in any way


def check_gguf(file: Path) -> None:
    """Check that a file is a whole language model with a quantized layer of a type that can be
    tuned.

    Raises:
        ModelError: it is not.
    """
    header, kinds = read_gguf_header(file), blocks.need_package().GGMLQuantizationType
    architecture = str(header.values.get("general.architecture", "unknown"))
    if gguf_of_pictures(architecture):
        raise ModelError(
            f"{file} is a GGUF file of a diffusion model ({architecture})",
            "a language model",
            "for pictures, give it to `qzo-diffuse train --transformer FILE.gguf`",
        )
    check_whole(file, header)
    if not any(kinds(tensor.kind).name in blocks.FACTORS for tensor in header.tensors.values()):
        raise ModelError(
            f"{file} without a quantized layer",
            ", ".join(blocks.FACTORS),
            "use a file of one of these types",
        )


def embedding_rows(file: Path) -> int | None:
    """Return the number of tokens that the file has embeddings for; None if it names none."""
    shapes = [tensor.shape for tensor in _reader(file).tensors if tensor.name == TOKENS]
    return int(shapes[0][-1]) if shapes else None


def source_of(file: Path) -> dict[str, str]:
    """Return the arguments by which transformers reads the file."""
    blocks.need_package()
    return {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}


def load_gguf(file: Path, dtype: torch.dtype) -> nn.Module:
    """Load the model with a layer of ours for every linear in blocks.

    Everything else is in `dtype`, and the last layer stays plain.

    Raises:
        ModelError: a tensor differs from the one that transformers reads.
    """
    import transformers

    reader = _reader(file)
    how: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "trust_remote_code": False}
    if hasattr(transformers, "GgufConfig"):
        # later versions may keep blocks in layers that do not see an override
        how["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loaded, facts = transformers.AutoModelForCausalLM.from_pretrained(
        **source_of(file), **how, output_loading_info=True
    )
    model: Any = loaded
    check_loaded(model, facts)
    tensors, head = (
        {tensor.name: tensor for tensor in reader.tensors},
        model.get_output_embeddings(),
    )
    for name, stored in _names(reader, model).items():
        tensor, linear = tensors.get(stored), model.get_submodule(name)
        if linear is not head and tensor is not None and tensor.tensor_type.name in blocks.FACTORS:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _layer(name, tensor, linear, model.config))
    whole: nn.Module = model
    return whole


def save_gguf(file: Path, target: Path, model: nn.Module, scales: Mapping[str, Tensor]) -> None:
    """Copy `file` into the folder `target` with the factors of these scales, rounded to fp16.

    Every other byte stays the same.
    """
    reader = _reader(file)
    places, names = (
        {tensor.name: tensor.data_offset for tensor in reader.tensors},
        _names(reader, model),
    )
    shutil.copyfile(file, target / file.name)
    with (target / file.name).open("r+b") as output:
        for handle in handles_of(model):
            module: Any = handle.module
            output.seek(places[names[handle.name]])
            output.write(module.bytes_to_store(scales[handle.name]).cpu().numpy().tobytes())


def _names(reader: Any, model: Any) -> dict[str, str]:
    """Return linear of the model -> name of its weight in the file."""
    gguf, field = blocks.need_package(), reader.fields.get("general.architecture")
    arch = next(
        (
            arch
            for arch, name in gguf.MODEL_ARCH_NAMES.items()
            if field and name == field.contents()
        ),
        None,
    )
    if arch is None:
        raise ModelError(
            "a GGUF file of an unknown architecture",
            "one that the package gguf knows",
            "update the package gguf",
        )
    known = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, blocks.GgufLinear))
    ]
    return {
        name: f"{stored}.weight" for name in linears if (stored := known.get_name(name)) is not None
    }


def _layer(name: str, tensor: Any, linear: nn.Linear, config: Any) -> blocks.GgufLinear:
    codes, kind = torch.from_numpy(np.array(tensor.data)), tensor.tensor_type.name
    heads = (
        config.num_attention_heads,
        getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
    )
    weight = linear.weight.float()
    for rows in (torch.arange(len(codes)), *(_interleaved(len(codes), count) for count in heads)):
        layer = blocks.GgufLinear(codes[rows], kind, rows, linear.bias)
        found = layer.dequantized()
        if found.shape == weight.shape and torch.allclose(found, weight, rtol=LIKE, atol=1e-6):
            return layer
    got = f"{name}, which is not {tensor.name} of the file"
    raise ModelError(
        got,
        "rows as they are, or as a Llama's heads have them",
        "use the model's safetensors folder",
    )


def _interleaved(rows: int, heads: int) -> Tensor:
    """Return the row of the file for each row of queries and keys.

    llama.cpp interleaves the two halves of a head.
    """
    if rows % (2 * heads):
        return torch.arange(rows)
    return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).flatten()


def _reader(file: Path) -> Any:
    read_gguf_header(file)
    facts = file.stat()
    return _read(file, facts.st_mtime_ns, facts.st_size)


@lru_cache(
    maxsize=1
)  # reading a vocabulary takes seconds, and a file is checked before it is loaded
def _read(file: Path, _changed: int, _size: int) -> Any:
    gguf = blocks.need_package()
    try:
        return gguf.GGUFReader(file)
    except Exception as error:  # damaged bytes may raise anything
        raise ModelError(
            f"{file} can't be read: {error}", "a GGUF file", "download it again"
        ) from None
