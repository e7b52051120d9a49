"""A reader of a file that is forged, and what it found."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.forged.forgeries import Forgery


@dataclass(frozen=True)
class Found:
    """What a reader used. told: it warned of something."""

    numbers: bytes
    told: bool = False
    finite: bool = True


@dataclass(frozen=True)
class Reader:
    """How a file is made and used.

    make: writes the files of a folder. use: reads them. file: the one that is forged. protected: a
    checksum tells any other number. renew: makes checksums anew after the forgery.
    """

    name: str
    file: str
    make: Callable[[Path], None]
    use: Callable[[Path], Found]
    forge: Sequence[Forgery]
    protected: bool = False
    renew: Callable[[Path], None] = field(default=lambda folder: None)


def of_tensors(tensors: Mapping[str, Tensor], told: bool = False) -> Found:
    digest, finite = hashlib.blake2b(digest_size=16), True
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        if tensor.is_floating_point() and tensor.element_size() > 1:
            finite = finite and bool(tensor.isfinite().all())
    return Found(digest.digest(), told, finite)


def of_value(value: Any) -> Found:
    return Found(hashlib.blake2b(repr(value).encode("utf-8", "replace"), digest_size=16).digest())
