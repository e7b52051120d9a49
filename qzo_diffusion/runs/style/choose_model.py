"""Choose the model that a `--model` means, and what ships for it: prompts and a scorer."""

from pathlib import Path
from typing import Literal

import torch

from qzo_diffusion import resources
from qzo_diffusion.config.style import Config
from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.devices import choose_device, choose_dtype
from qzo_diffusion.diffusion import memory
from qzo_diffusion.diffusion.model_folder import family_of_folder
from qzo_diffusion.diffusion.transformer import empty_transformer, find_transformer
from qzo_diffusion.evaluate.scorer import DEFAULT_SCORER, EMBEDDED
from qzo_diffusion.runs import build, hub


def choose_model(name: str) -> tuple[Path, str]:
    """Return the pipeline folder that a `--model` means, and a sentence that says which and why.

    Raises:
        ModelError: it is missing; the message says how to get it.
    """
    if name == "auto":
        return _choose_automatically()
    if name == "tiny":
        return resources.tiny_model(), "model: tiny, the embedded model"
    if Path(name).is_dir():
        return Path(name), f"model: the folder {name}"
    if Path(name).is_file():
        return Path(
            name
        ).resolve().parent, f"model: the single file {name}, with the other parts from its folder"
    cached = hub.cached_snapshot(name)
    if cached is None:
        raise hub.not_here(name)
    return cached, f"model: {name} from the local cache"


def _choose_automatically() -> tuple[Path, str]:
    """Return the large model if its weights are here and fit, else the embedded one.

    With a GPU and without weights it raises ModelError.
    """
    cached = hub.cached_snapshot(hub.BIG_MODEL)
    if cached is None:
        if torch.cuda.is_available():
            raise ModelError(
                f"a GPU, but no weights of {hub.BIG_MODEL} in the local cache",
                "downloaded weights, or a model by name",
                f"accept the licence at https://huggingface.co/{hub.BIG_MODEL}, then "
                f"`hf auth login` and `{hub.download_command(hub.BIG_MODEL)}`; or add --model "
                "tiny for the embedded model",
            )
        return (
            resources.tiny_model(),
            f"model: tiny, the embedded model (no GPU and no weights of {hub.BIG_MODEL} here)",
        )
    device = choose_device("auto")
    needed, free = least_memory(cached, device), memory.available_bytes(device)
    if free is not None and needed > free:
        why = (
            f"{hub.BIG_MODEL} is here but needs {needed / 1e9:.1f} GB of memory at the least; "
            f"{free / 1e9:.1f} GB are free"
        )
        return resources.tiny_model(), f"model: tiny, the embedded model ({why})"
    return cached, f"model: {hub.BIG_MODEL}, found in the local cache"


def least_memory(folder: Path, device: torch.device) -> float:
    """Return the bytes that any run of a model needs.

    Raises:
        ModelError: its transformer is not whole.
    """
    config, dtype = Config(), choose_dtype("auto", device)
    family = family_of_folder(folder)
    found = find_transformer(folder / family.denoiser.part, family)
    how = build.quantization(config.quant, family.denoiser.skip)
    size = memory.ModelSize.of(empty_transformer(found.config), how, dtype)
    return memory.least_bytes(size, found.entries, dtype, device.type)


def is_tiny(folder: Path) -> bool:
    return folder.resolve() == resources.tiny_model().resolve()


def shipped_prompts(folder: Path, use: Literal["grid", "score", "styles", "things"]) -> str:
    """Return the name of the shipped prompts that suit the model; for `styles` and `things` see
    `qzo-diffuse subspace`.
    """
    return f"tiny_{use}.txt" if is_tiny(folder) else f"{use}.txt"


def default_scorer(folder: Path) -> str:
    """Return the name of the scorer that suits the model."""
    return EMBEDDED if is_tiny(folder) else DEFAULT_SCORER


def resolve_model_(config: Config, folder: Path) -> None:
    """Name the model that `auto` chose, so that a run goes on with the same one."""
    if config.model == "auto":
        config.model = "tiny" if is_tiny(folder) else hub.BIG_MODEL
