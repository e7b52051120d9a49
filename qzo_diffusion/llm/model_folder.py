"""Check before anything is loaded that a folder holds a causal language model that can be read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.llm.gguf_file import check_gguf
from qzo_diffusion.llm.stored import READ_HERE, empty_causal_lm, stored_method
from qzo_diffusion.quant.config_file import read_config
from qzo_diffusion.quant.describe import SAFETENSORS
from qzo_diffusion.quant.fits import check_fits, is_converted, named_as_in
from qzo_diffusion.quant.gguf_header import is_gguf
from qzo_diffusion.quant.weights import read_entries

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
FOLDER = "a folder of transformers: config.json, *.safetensors and a tokenizer"
# Their layers are Conv1D, a linear layer whose weight is transposed.
OF_CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
WITH_LINEARS = "a model of nn.Linear layers, such as Llama, Qwen, SmolLM2, OPT or GPT-NeoX"


def check_model_folder(folder: Path) -> None:
    """Check that `folder` is a transformers causal LM with weights and a tokenizer, in a supported
    format.

    A GGUF file holds all of it.

    Raises:
        ModelError: it is not.
    """
    if is_gguf(folder):
        return check_gguf(folder)
    _check_files(folder)
    config = read_config(folder / "config.json", len(read_entries(folder)))
    _check_kind(folder, config)
    method = stored_method(folder)
    if method not in (None, "bitsandbytes", *READ_HERE):
        raise ModelError(
            f"{folder} is quantized by {method}",
            f"bitsandbytes, {', '.join(READ_HERE)}, or a model that is not quantized",
            "give the model it was made of; it is quantized to NF4 while it is read",
        )


def check_weights(folder: Path) -> None:
    """Check that a folder without quantization has the tensors that its config describes.

    Other formats are checked while they are loaded.

    Raises:
        ModelError: tensors are missing, or others are there.
    """
    if is_gguf(folder) or stored_method(folder) is not None:
        return
    model = empty_causal_lm(folder, torch.float32)
    if not is_converted(model):
        check_fits(model, named_as_in(model, read_entries(folder)))


def _check_files(folder: Path) -> None:
    if (folder / "model_index.json").is_file():
        raise ModelError(
            f"{folder} is a pipeline that makes pictures",
            "a causal language model",
            "give it to `qzo-diffuse train`",
        )
    has_config = (folder / "config.json").is_file()
    if (folder / "adapter_config.json").is_file() and not has_config:
        raise ModelError(
            f"{folder} is a LoRA, as peft saves it",
            FOLDER,
            "give the whole model; merge the LoRA into its base first (peft: merge_and_unload)",
        )
    problems = {
        "config.json": has_config,
        "weights": any(folder.glob("*.safetensors"))
        or any(folder.glob("*.safetensors.index.json")),
        "a tokenizer": any((folder / name).is_file() for name in TOKENIZER_FILES),
    }
    missing = [name for name, there in problems.items() if not there]
    pickles = sorted(file.name for file in folder.glob("*") if file.suffix.lower() in PICKLES)
    if missing == ["weights"] and pickles:
        raise ModelError(f"{folder} holds pickles only ({pickles[0]})", FOLDER, SAFETENSORS)
    if missing:
        raise ModelError(
            f"{folder} without {' and '.join(missing)}",
            FOLDER,
            "download the whole model, for example hf download ID --local-dir FOLDER",
        )


def _check_kind(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse every other kind than causal language models of linear layers. Raises ModelError."""
    kind = str(config.get("model_type", ""))
    if kind in OF_CONV1D:
        raise ModelError(
            f"{folder} is of the kind {kind}, whose layers are Conv1D and not nn.Linear",
            WITH_LINEARS,
            "use another model",
        )
    if config.get("is_encoder_decoder") is True:
        raise ModelError(
            f"{folder} is of the kind {kind}, an encoder and a decoder",
            "a causal language model: a decoder alone",
            "use another model",
        )
    if "_class_name" in config and not kind:
        raise ModelError(
            f"{folder} is a part of a pipeline that makes pictures ({config['_class_name']})",
            "a causal language model",
            "give its pipeline to `qzo-diffuse train`",
        )
