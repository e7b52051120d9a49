"""Find the folder of a language model from a config."""

from pathlib import Path

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.quant.describe import described, family_of
from qzo_diffusion.quant.gguf_header import is_gguf
from qzo_diffusion.runs.hub import cached_snapshot, is_gated


def choose_lm(name: str) -> tuple[Path, str]:
    """Return the folder or GGUF file that a `--model` means, and a sentence that names it.

    Raises:
        ModelError: it is missing; the message says how to get it.
    """
    if Path(name).is_dir():
        return Path(name), f"model: the folder {name}"
    if is_gguf(Path(name)):
        return Path(name), f"model: the file {name}"
    if Path(name).is_file():
        raise _no_model_file(Path(name))
    if name == "tiny" or family_of(name) is not None or is_gated(name):
        raise ModelError(
            f"{name!r}, a model that makes pictures",
            "a causal language model, such as HuggingFaceTB/SmolLM2-135M",
            "give it to `qzo-diffuse train`",
        )
    cached = None if name == "auto" else cached_snapshot(name, "config.json")
    if cached is None:
        raise ModelError(
            "no language model is named"
            if name == "auto"
            else f"{name!r} is neither a folder nor a model in the local cache",
            "a transformers folder, a GGUF file, or a Hub id that was downloaded",
            "pass --model FOLDER or FILE.gguf; for a model of the Hub: hf download ID "
            "--local-dir FOLDER",
        )
    return cached, f"model: {name} from the local cache"


def _no_model_file(file: Path) -> ModelError:
    kind = described(file)
    return ModelError(
        f"{file} is {kind.name}" if kind else f"{file} is one file, and no GGUF file",
        "a transformers folder, or a GGUF file",
        kind.remedy if kind else "give the folder of the model: config.json, weights, tokenizer",
    )
