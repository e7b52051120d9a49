"""Find models of the Hub in the local cache, and explain how to get others. It never downloads."""

from pathlib import Path

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.diffusion.families import registry
from qzo_diffusion.quant.describe import family_of, is_language_model
from qzo_diffusion.system.files import free_bytes

BIG_MODEL = registry.DEFAULT_MODEL
SUPPORTED = f"a model of a known family, or tiny: {registry.known()}"
FILES = (".safetensors", ".gguf", ".ckpt", ".pt", ".bin", ".onnx")  # endings of weights


def download_command(name: str) -> str:
    """Return the command that downloads a model.

    It leaves out files that the repositories of a family hold twice.
    """
    family = registry.of_hub_id(name)
    twice = "".join(f" --exclude '{one}'" for one in (family.hub.twice if family else ()))
    return f"hf download {name}{twice}"


def is_gated(name: str) -> bool:
    """Return whether a licence must be accepted before a model can be downloaded."""
    return any(name.startswith(family.hub.gated) for family in registry.FAMILIES)


def not_here(name: str) -> ModelError:
    """Return an error that says how to get the model, and which other requirements this machine
    lacks.
    """
    if (other := _other_kind(name)) is not None:
        return other
    from huggingface_hub import constants, get_token

    place = Path(constants.HF_HUB_CACHE)
    got = [
        f"{name!r} is neither a folder, nor a file, nor a whole model in the local cache {place}"
    ]
    steps = []
    gated, family = is_gated(name), registry.of_hub_id(name)
    if gated:
        steps.append(f"accept the licence at https://huggingface.co/{name}")
        if get_token() is None:
            got.append("it is gated and no access token is stored here")
            steps.append("`hf auth login`")
    free = free_bytes(place)
    if gated and family is not None and free < family.hub.nbytes:
        got.append(
            f"{free / 1e9:.0f} GB are free where it would go, about {family.hub.nbytes / 1e9:.0f} "
            "GB are needed"
        )
        steps.append("free some space, or set HF_HOME to a larger disk")
    steps.append(f"`{download_command(name)}`")
    steps.append(
        "without network: copy the model's folder from another machine and give --model PATH; "
        "or --model tiny"
    )
    return ModelError(
        "; ".join(got),
        f"{SUPPORTED}; or a folder of such a pipeline",
        "\n  ".join(["", *steps]),
    )


def _other_kind(name: str) -> ModelError | None:
    """Return an error for a name of another kind of model, which a download would not help."""
    remedy = f"--model {BIG_MODEL}, or --model tiny for the embedded model"
    if registry.of_hub_id(name) is None and (family := family_of(name)) is not None:
        return ModelError(f"{name!r}, a model of {family}", SUPPORTED, remedy)
    if is_language_model(name):
        return ModelError(
            f"{name!r}, a language model", SUPPORTED, f"`qzo-diffuse llm train` for texts; {remedy}"
        )
    if (file := Path(name)).suffix.lower() in FILES or file.is_absolute():
        return ModelError(f"{name} is not there", SUPPORTED, "correct the path")
    return None


def cached_snapshot(name: str, file: str = "model_index.json") -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        index = try_to_load_from_cache(name, file)
    except HFValidationError:
        return None
    return Path(index).parent if isinstance(index, str) else None
