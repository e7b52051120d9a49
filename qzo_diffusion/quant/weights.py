"""The safetensors files of a model's folder, and files that are written one tensor at a time.

`save_file` wants all tensors at once. Here a file is written from functions that make one tensor
after the other."""

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qzo_diffusion.core.errors import ModelError, OutputError
from qzo_diffusion.quant.entries import NAMES, Entry, damaged
from qzo_diffusion.quant.header import read_header
from qzo_diffusion.quant.json_file import read_object
from qzo_diffusion.quant.scaled import with_scales


def weight_files(place: Path) -> list[Path]:
    """The safetensors files that a folder of one model means: those its index names, or its one
    file.

    Args:
        place: the folder, or a file, which stands for itself.

    Raises:
        ModelError: there are none, one is missing, or it is not clear which are meant.
    """
    if place.is_file():
        return [place]
    for stem in ("diffusion_pytorch_model", "model"):
        if (index := place / f"{stem}.safetensors.index.json").is_file():
            return _indexed_files(index)
        if (file := place / f"{stem}.safetensors").is_file():
            return [file]
    indexes, files = sorted(place.glob("*.index*.json")), sorted(place.glob("*.safetensors"))
    if len(indexes) == 1:
        return _indexed_files(indexes[0])
    if len(files) == 1:
        return files
    raise _unclear(place, [file.name for file in files])


def _unclear(place: Path, files: list[str]) -> ModelError:
    named = f" ({', '.join(files[:3])})" if files else ""
    return ModelError(
        f"{place} holds {len(files) or 'no'} safetensors files{named} and no index",
        "model.safetensors, or several with model.safetensors.index.json",
        "keep the files of one variant" if files else "download the model again",
    )


def read_entries(place: Path) -> dict[str, Entry]:
    """All tensors of a model's folder or of a single file, by name, with their scales.

    Raises ModelError.
    """
    found: dict[str, Entry] = {}
    for file in weight_files(place):
        entries, _ = read_header(file)
        if repeated := sorted(found.keys() & entries.keys()):
            raise damaged(file, f"{repeated[0]} is in another file of the model, too")
        found |= entries
    return with_scales(found)


@dataclass(frozen=True)
class Pending:
    """A tensor that is made when its turn to be written comes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: Tensor) -> "Pending":
        return cls(tensor.dtype, tuple(tensor.shape), lambda: tensor)


def write_tensors(
    file: Path,
    tensors: Mapping[str, Pending],
    metadata: Mapping[str, str],
    progress: Callable[[int], object] = lambda nbytes: None,
) -> None:
    """A safetensors file, one tensor in memory at a time, synced; a kill leaves half of it, so
    write it aside.

    Raises:
        ValueError: a tensor is not of the shape and dtype that were announced.
    """
    # Whole words first: a tensor that starts at an odd place can't be viewed in its dtype when it
    # is mapped.
    order = sorted(
        tensors, key=lambda name: -tensors[name].dtype.itemsize if tensors[name].nbytes % 8 else -8
    )
    header: dict[str, object] = {"__metadata__": {"format": "pt"} | dict(metadata)}
    end = 0
    for name in order:
        one = tensors[name]
        header[name] = {
            "dtype": NAMES[one.dtype],
            "shape": list(one.shape),
            "data_offsets": [end, end + one.nbytes],
        }
        end += one.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensor = tensors[name].make().detach().cpu().contiguous()
            if tensor.dtype != tensors[name].dtype or tuple(tensor.shape) != tensors[name].shape:
                raise ValueError(
                    f"{name}: {tensor.dtype} {tuple(tensor.shape)} where {tensors[name]} was "
                    "announced"
                )
            if tensor.numel():
                handle.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            progress(tensors[name].nbytes)
        handle.flush()
        os.fsync(handle.fileno())


def compare_tensors(
    file: Path,
    tensors: Mapping[str, Pending],
    progress: Callable[[int], object] = lambda nbytes: None,
) -> None:
    """Read a file that `write_tensors` wrote and compare it bit for bit, one tensor at a time.

    Raises:
        OutputError: it is not what was written.
    """
    try:
        entries, _ = read_header(file)
        wrong = sorted(entries.keys() ^ tensors.keys())
        for name in () if wrong else tensors:
            wanted = tensors[name].make().detach().cpu()
            read = entries[name].read()
            same = (
                read.dtype == wanted.dtype
                and read.shape == wanted.shape
                and torch.equal(_bits(read), _bits(wanted))
            )
            wrong += [] if same else [name]
            progress(tensors[name].nbytes)
    except ModelError as error:
        raise OutputError(
            f"{file} can't be read back: {error.got}",
            "what was written",
            "check the disk and try again",
        ) from None
    if wrong:
        raise OutputError(
            f"{file} is not what was written, for example {wrong[0]}",
            "the same bits",
            "check the disk and try again",
        )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else tensor


def _index(file: Path) -> dict[str, str]:
    """Tensor -> file of a model of several files. Raises ModelError."""
    names = read_object(file, "an index of safetensors files").get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(one, str) for one in names.values()):
        raise damaged(file, "it is not an index")
    for name in set(names.values()):
        if Path(name).name != name or "\\" in name or "\0" in name:
            raise ModelError(
                f"{file} leads to {name!r}, out of its folder",
                "names of files beside it",
                "download the model again, from a place that you trust",
            )
    return names


def _indexed_files(index: Path) -> list[Path]:
    names = sorted(set(_index(index).values()))
    files = [index.parent / name for name in names]
    for name, file in zip(names, files, strict=True):
        if not file.is_file():
            raise ModelError(
                f"{index.parent} lacks the file {name}",
                f"the {len(names)} files that {index.name} names",
                "download it again",
            )
    return files
