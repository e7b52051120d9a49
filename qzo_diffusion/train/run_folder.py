"""The folder of one run, and how things are put into it: whole or not at all.

A folder of weights (`final/`, a checkpoint) is written under another name, synced, marked and
renamed. Its marker COMPLETE holds a hash of every file, so that what was damaged later is found
when it is read and never applied."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qzo_diffusion.core.errors import OutputError
from qzo_diffusion.system.files import (
    SCALES,
    check_empty,
    clear_leftovers,
    finite,
    sync,
    unwritable,
    write_folder,
    write_whole,
)

MOST_DIMENSIONS = 8  # torch itself takes 64
LONGEST_HEADER = 2**24  # bytes; the 1,500 layers of a large model take 0.3 MB


class RunFolder:
    """Names and writes the files of a run.

    `create` makes a new one, the constructor opens what is there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, remedy: str | None = None) -> "RunFolder":
        """Raises OutputError when the folder holds something already, with the caller's `remedy`,
        or can't be written.
        """
        check_empty(
            path, remedy or f"choose another --output-dir, or go on with that run: --resume {path}"
        )
        try:
            if path.is_dir():
                clear_leftovers(path)
            (path / "samples").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(path, error) from error
        return cls(path)

    def write_text(self, name: str, text: str) -> None:
        write_whole(self.path / name, text.encode())

    def write_json(self, name: str, content: Any) -> None:
        """Strict JSON: a number that is not finite is written as null."""
        text = json.dumps(finite(content), indent=1, ensure_ascii=False, allow_nan=False)
        self.write_text(name, text + "\n")

    def save_scales(
        self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
    ) -> Path:
        """`<name>/scales.safetensors` in a complete folder."""
        return write_folder(
            self.path / name, lambda folder: save_tensors(folder / SCALES, tensors, metadata)
        )


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    # Never without metadata: safetensors writes a header that it can't read when there are no
    # tensors either.
    facts = {"format": "pt"} | dict(metadata or {})
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, facts
    )
    sync(path)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file of a run.

    Raises OutputError when it is damaged or missing, or holds a number that is not finite.
    """
    try:
        check_header(path)
        with safe_open(path, "pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            facts = handle.metadata() or {}
        if any(tensor.ndim > MOST_DIMENSIONS for tensor in tensors.values()):
            raise ValueError(f"a tensor of more than {MOST_DIMENSIONS} dimensions")
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise OutputError(
            f"{path} is damaged: {error}", "a safetensors file of this program", "give another run"
        ) from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise OutputError(
                f"{path} holds numbers that are not finite, in {name}",
                "the numbers of a run, all of them finite",
                "give another run or checkpoint",
            )
    return tensors, facts


def check_header(path: Path) -> None:
    """Raises ValueError for a header longer than any run's: its parser takes many times its
    length.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > LONGEST_HEADER:
        raise ValueError(f"a header of {length} bytes")
