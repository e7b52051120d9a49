"""The file of a run's subspace: directions of rows [k, rows] by layer, in safetensors."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qzo_diffusion import resources
from qzo_diffusion.core.errors import ConfigError, OutputError
from qzo_diffusion.train.run_folder import check_header, load_tensors

TINY, FILE = "tiny", "subspace.safetensors"


def path_of(name: str) -> Path:
    """Return the file that `qzo.subspace` names; `tiny` is that of the embedded model.

    Raises:
        ConfigError: there is no such file.
    """
    path = resources.tiny_model() / FILE if name == TINY else Path(name)
    if not path.is_file():
        raise ConfigError(
            f"qzo.subspace={name}: no such file",
            "a safetensors file of directions",
            "correct the path, or give qzo.subspace=null",
        )
    return path


def check_subspace(name: str | None) -> None:
    """See from the file's header that it holds matrices alone, [k, rows] by layer.

    Raises:
        ConfigError: there is no such file, or it holds something else.
    """
    if name is None:
        return
    path = path_of(name)
    try:
        check_header(path)
        with safe_open(path, "pt") as file:
            shapes = [file.get_slice(layer).get_shape() for layer in file.keys()]  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise _not_directions(name, f"{path} is damaged: {error}") from None
    _check_shapes(name, shapes)


def load_subspace(name: str | None) -> dict[str, Tensor] | None:
    """Return the directions by layer.

    Raises:
        ConfigError: there is no such file, or it is damaged.
    """
    if name is None:
        return None
    try:
        found = load_tensors(path_of(name))[0]
    except OutputError as error:
        raise _not_directions(name, error.got) from None
    _check_shapes(name, [one.shape for one in found.values()])
    return found


def _check_shapes(name: str, shapes: Sequence[Sequence[int]]) -> None:
    if not shapes or any(len(shape) != 2 for shape in shapes):
        raise _not_directions(name, "it holds something else")


def _not_directions(name: str, problem: str) -> ConfigError:
    return ConfigError(
        f"qzo.subspace={name}: {problem}",
        "a safetensors file of directions [k, rows] by layer",
        "give the file that qzo-diffuse subspace wrote for this model, or qzo.subspace=null",
    )


def file_hash(name: str | None) -> str | None:
    """Return the SHA-256 of the file, by which a replay sees that it has the journal's file."""
    return None if name is None else hashlib.sha256(path_of(name).read_bytes()).hexdigest()


def subspace_bytes(name: str) -> float:
    """Return the memory of the directions: the file's, in fp16, and as they are used, in fp32."""
    return 3.0 * path_of(name).stat().st_size
