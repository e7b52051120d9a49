"""Resolve the settings of device and dtype."""

import os
import sys
from typing import Literal

import torch

from qzo_diffusion.core.errors import ConfigError

TYPES = ("cpu", "cuda")  # whose memory planning knows


def choose_device(name: str) -> torch.device:
    """Raises ConfigError for a device that torch doesn't know or doesn't see, or that nothing here
    was made for.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        # of several processes on one machine each takes a GPU of its own
        local = os.environ.get("LOCAL_RANK", "")
        return (
            torch.device("cuda", int(local) % torch.cuda.device_count())
            if local.isdigit()
            else torch.device("cuda")
        )
    try:
        device = torch.device(name)
        if device.type not in TYPES:
            raise RuntimeError(f"{device.type} is no device of this program")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"compute.device = {name!r}: {reason}", "auto, cpu or cuda", "use compute.device=cpu"
        ) from None
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of forward passes: "auto" is bfloat16 on a GPU and float32 on a CPU.

    Scales and losses are fp32 always.
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def dtype_name(dtype: torch.dtype) -> Literal["float32", "bfloat16", "float16"]:
    names: dict[torch.dtype, Literal["float32", "bfloat16", "float16"]]
    names = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
    return names[dtype]


def peak_bytes(device: torch.device) -> int | None:
    """Most memory that this process held so far: of the GPU on a GPU, else of the machine.

    None where the system does not count it.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # kilobytes elsewhere
