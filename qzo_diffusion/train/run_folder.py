"""The folder of one run, and how files are put into it: whole or not at all."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qzo_diffusion.core.errors import OutputError

COMPLETE = "COMPLETE"  # the marker that a folder of weights was written to its end


class RunFolder:
    """Names and writes the files of a run.

    Raises:
        OutputError: the folder holds a run already, or can't be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise OutputError(
                f"{path} exists and is not an empty folder",
                "a new output folder; a run is never overwritten",
                "choose another --output-dir, or move the old run away",
            )
        try:
            (path / "samples").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"{path} can't be written: {error.strerror or error}",
                "a folder that can be made and written",
                "choose another --output-dir",
            ) from error

    def write_text(self, name: str, text: str) -> None:
        write_whole(self.path / name, text)

    def write_json(self, name: str, content: Any) -> None:
        self.write_text(name, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def save_scales(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
        """`<name>/scales.safetensors` and, last of all, a completion marker."""
        folder = self.path / name
        folder.mkdir(parents=True, exist_ok=True)
        marker = folder / COMPLETE
        marker.unlink(missing_ok=True)
        save_scales(folder / "scales.safetensors", tensors, metadata)
        write_whole(marker, "")
        return folder


def write_whole(path: Path, text: str) -> None:
    """Write to another name, sync, rename: a reader never sees half a file."""
    aside = path.with_name(f".{path.name}.partial")
    with aside.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(aside, path)


def save_scales(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    aside = path.with_name(f".{path.name}.partial")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, aside, dict(metadata))
    with aside.open("rb") as handle:
        os.fsync(handle.fileno())
    os.replace(aside, path)


def load_scales(run: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tuned scales of a run folder (its `final/`), of a checkpoint folder, or of a safetensors file, with metadata.

    Raises:
        OutputError: there are none, or the file is damaged or was not finished.
    """
    remedy = "give the folder of a finished run, or one of its checkpoints"
    folder = run / "final" if (run / "final").is_dir() else run
    file = folder if folder.is_file() else folder / "scales.safetensors"
    if not file.is_file():
        raise OutputError(f"no tuned scales in {run}", "final/scales.safetensors", remedy)
    if folder.is_dir() and not (folder / COMPLETE).exists():
        raise OutputError(f"{folder} was not written to its end", f"a folder with the marker {COMPLETE}", remedy)
    try:
        with safe_open(file, "pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}, handle.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise OutputError(f"{file} is damaged: {error}", "a safetensors file of this program", remedy) from None
