"""Check the folder of a pipeline before anything is loaded, and identify its files."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.diffusion.autoencoders import reduction
from qzo_diffusion.diffusion.families import registry
from qzo_diffusion.diffusion.families.family import Family
from qzo_diffusion.diffusion.vae import read_vae_config
from qzo_diffusion.quant.config_file import read_config
from qzo_diffusion.quant.describe import described_tensors, family_of_class
from qzo_diffusion.quant.gguf_entries import read_gguf_entries
from qzo_diffusion.quant.gguf_header import is_gguf
from qzo_diffusion.quant.json_file import read_object
from qzo_diffusion.quant.weights import read_entries

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
# bytes; larger files are identified by size, time and their first part
HASHED_IN_FULL = 256 * 2**20
INDEX = "model_index.json"
VARIANT = ".fp16"  # in the names of files, which a plain `from_pretrained` does not read
PIPELINE = f"a diffusers folder of a pipeline ({INDEX}, vae/, scheduler/, ...)"


def family_of_folder(folder: Path, name: str | None = None, file: Path | None = None) -> Family:
    """Return the family of a pipeline's folder.

    Args:
        name: of the family, in place of the one that the folder states.
        file: a single file of the denoiser, which tells the family where no index does.

    Raises:
        ConfigError: no family has that name.
        ModelError: the folder is no pipeline, or one of an unknown family.
    """
    if name is not None:
        return registry.by_name(name)
    if file is not None and not (folder / INDEX).is_file():
        own = _family_of_file(file)
        if own is not None:
            return own
    stated = str(_index_of(folder).get("_class_name", registry.DEFAULT.sampling.pipelines[0]))
    family = registry.of_pipeline(stated)
    if family is None:
        raise ModelError(
            f"{folder} is a pipeline of {family_of_class(stated)} ({stated})",
            f"a model of a known family: {registry.known()}",
            "give --model one of these; or --family NAME, if it has the parts of that family",
        )
    return family


def _family_of_file(file: Path) -> Family | None:
    """Return the family of a single file, by its metadata or its tensors.

    Raises:
        ModelError: it is damaged, or known to be something else.
    """
    if not is_gguf(file):
        entries = read_entries(file)
        family, kind = registry.of_names(entries), described_tensors(entries)
        if family is None and kind is not None:
            raise ModelError(f"{file} is {kind.name}", registry.known(), kind.remedy)
        return family
    entries, header = read_gguf_entries(file)
    architecture = str(header.values.get("general.architecture", ""))
    return registry.of_names(entries) or registry.of_gguf(architecture)


def check_model_folder(folder: Path, family: Family, without: Sequence[str] = ()) -> None:
    """Check that a folder is a whole pipeline in safetensors, before anything is loaded.

    Args:
        without: parts that come from elsewhere, or that a run leaves out.

    Raises:
        ModelError: a part is missing or holds pickles only; the message names it.
    """
    if (folder / INDEX).is_file():
        parts = {name for name, kind in _index_of(folder).items() if _is_part(kind)}
    else:  # the family is known from elsewhere
        parts = {place.name for place in folder.iterdir() if place.is_dir()}
    for part in family.needed:
        if part not in without and (part not in parts or not (folder / part).is_dir()):
            raise ModelError(
                f"{folder} lacks the part {part}/",
                f"{PIPELINE} of {family.title}",
                "download the model again, with all its parts",
            )
    for part in family.weighty:
        if part in without or part not in parts:
            continue
        files = sorted(file.name for file in (folder / part).glob("*.safetensors"))
        if not files:
            raise _without_weights(folder, part, family)
        if all(VARIANT in name for name in files):
            raise ModelError(
                f"{part}/ holds the fp16 variant alone ({files[0]})",
                f"{part}/{files[0].replace(VARIANT, '')}",
                "download the files without fp16 in their names; or remove .fp16 from the names "
                "of these, and give compute.dtype=float16 or bfloat16",
            )


def _is_part(kind: Any) -> bool:
    return isinstance(kind, list) and any(kind[:1])


def _index_of(folder: Path) -> dict[str, Any]:
    """Return model_index.json. Raises ModelError."""
    file = folder / INDEX
    if not file.is_file():
        kind = _kind_of_folder(folder)
        raise ModelError(
            f"{folder} is {kind}" if kind else f"{folder} has no {INDEX}",
            PIPELINE,
            "give --model a pipeline folder, a Hub id, or tiny"
            + ("; a transformer alone goes to transformer=PATH" if kind else ""),
        )
    return read_object(file, PIPELINE)


def read_index(folder: Path) -> dict[str, Any]:
    """Return model_index.json, empty where there is none. Raises ModelError for a damaged one."""
    file = folder / INDEX
    return read_object(file, PIPELINE) if file.is_file() else {}


def is_distilled(folder: Path, family: Family) -> bool:
    """Return whether a pipeline's folder says that the model was distilled to few steps.

    Raises:
        ModelError: a config is damaged.
    """
    config = folder / family.denoiser.part / "config.json"
    return family.distilled(read_config(config) if config.is_file() else {}, read_index(folder))


def _kind_of_folder(folder: Path) -> str | None:
    """Describe a folder that is not a pipeline."""
    if (folder / "adapter_config.json").is_file():
        return "a LoRA, as peft saves it"
    if not (folder / "config.json").is_file():
        return None
    config = read_object(folder / "config.json", PIPELINE)
    if "_class_name" in config:
        return f"one part of a pipeline ({config['_class_name']})"
    if "model_type" in config:
        return f"a model of transformers ({config['model_type']}), for `qzo-diffuse llm`"
    return None


def _without_weights(folder: Path, part: str, family: Family) -> ModelError:
    files = sorted((folder / part).glob("*"))
    pickles = [file.name for file in files if file.suffix.lower() in PICKLES]
    remedy = "get the safetensors version; pickles can run code and are not read"
    if not pickles:
        remedy = "download the model again, with all its parts"
    if part == family.texts.large and family.texts.large_optional:
        remedy += "; or leave T5 out: text.t5=none"
    return ModelError(
        f"{part}/ holds pickles only ({pickles[0]})" if pickles else f"{part}/ holds no weights",
        f"{part}/*.safetensors",
        remedy,
    )


def fingerprint_of_files(folder: Path, parts: Iterable[str]) -> str:
    """Identify the files of some parts of a model, for cache keys: by their bytes up to 256 MiB."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(
        file for part in parts for file in (folder / part).glob("*") if file.is_file()
    ):
        status = file.stat()
        digest.update(f"{file.parent.name}/{file.name}:{status.st_size}".encode())
        with file.open("rb") as handle:
            if status.st_size > HASHED_IN_FULL:
                digest.update(str(status.st_mtime_ns).encode())
            digest.update(
                handle.read(HASHED_IN_FULL if status.st_size <= HASHED_IN_FULL else 2**20)
            )
    return digest.hexdigest()


def load_scheduler(folder: Path, family: Family) -> Any:
    """Load the scheduler of a pipeline folder.

    Raises:
        ModelError: its config is damaged, or belongs to a scheduler that the family can't use.
    """
    import diffusers

    file = folder / "scheduler" / "scheduler_config.json"
    config = read_object(file, "the config of a scheduler")
    known = family.sampling.schedulers
    kind = config.get("_class_name", known[0])
    try:
        if kind not in known:
            raise ValueError(f"it is of {kind}")
        return getattr(diffusers, kind).from_config(config)
    except Exception as error:  # a wrong value may raise anything in diffusers
        raise ModelError(
            f"{file} is refused: {error}",
            f"a scheduler of {family.title}: {', '.join(known)}",
            f"put the scheduler/ of a model of {family.title} there",
        ) from None


def native_resolution(folder: Path, family: Family) -> int:
    """Return the side in pixels that the model was trained at: the denoiser's sample size times the
    VAE's reduction.

    Raises:
        ModelError: a config is damaged.
    """
    config = folder / family.denoiser.part / "config.json"
    # a single file has no such setting
    denoiser = read_config(config) if config.is_file() else {}
    size = denoiser.get("sample_size", family.denoiser.sample_size)
    return int(size) * reduction(read_vae_config(folder / "vae" / "config.json", family))
