"""Resolve the settings of device and dtype, and ask a device for its name and memory.

Torch's names are taken: AMD's GPUs are `cuda` in a torch for ROCm. docs/devices.md says which of
them were run.
"""

import os
import platform
import shutil
import sys
from typing import Literal

import torch

from qzo_diffusion.core.errors import ConfigError, OutOfMemory
from qzo_diffusion.core.precision import has_bfloat16
from qzo_diffusion.system.heap import give_back

TYPES = ("cpu", "cuda", "xpu", "mps")
NAMES = "auto, cpu, cuda, xpu or mps"


def choose_device(name: str) -> torch.device:
    """Raises ConfigError for a device that torch doesn't know or doesn't see, or that nothing here
    was made for.
    """
    if name == "auto":
        return _automatic()
    try:
        device = torch.device(name)
        if device.type not in TYPES:
            raise RuntimeError(f"{device.type} is no device of this program")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"compute.device = {name!r}: {reason}", NAMES, "use compute.device=cpu"
        ) from None
    return device


def _automatic() -> torch.device:
    """A GPU of NVIDIA or AMD, else the CPU: the others were never run, so that they are asked for
    by name.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # of several processes on one machine each takes a GPU of its own
    local = os.environ.get("LOCAL_RANK", "")
    return (
        torch.device("cuda", int(local) % torch.cuda.device_count())
        if local.isdigit()
        else torch.device("cuda")
    )


def others() -> list[str]:
    """Devices that are here and never chosen by "auto"."""
    here = {
        "xpu": hasattr(torch, "xpu") and torch.xpu.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    return [name for name, available in here.items() if available]


def unseen_gpu() -> str | None:
    """Return what a user is told where a GPU of NVIDIA is here and torch does not see it."""
    if torch.cuda.is_available() or shutil.which("nvidia-smi") is None:
        return None
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return (
        f"a driver of NVIDIA is here, but torch {torch.__version__}, {built}, sees no GPU: install "
        "torch's build for the CUDA of your driver (pytorch.org has the command), or a newer driver"
    )


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of forward passes: "auto" is float32 on a CPU, and on a GPU bfloat16, or
    float16 where it has no bfloat16.

    Scales and losses are fp32 always.
    """
    if name == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if has_bfloat16(device) else torch.float16
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def slow_dtype(dtype: torch.dtype, device: torch.device) -> str | None:
    """Return what a user is told where a device takes many times as long in a dtype."""
    if dtype is not torch.bfloat16:
        return None
    if device.type == "cuda" and not has_bfloat16(device):
        return "this GPU has no bfloat16, and torch emulates it slowly: use compute.dtype=float16"
    of_intel = device.type == "cpu" and platform.machine().lower() in ("x86_64", "amd64")
    if of_intel and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
        return (
            "this processor has no AVX512, without which bfloat16 takes up to forty times as long: "
            "use compute.dtype=float32 if memory allows"
        )
    return None


def dtype_name(dtype: torch.dtype) -> Literal["float32", "bfloat16", "float16"]:
    names: dict[torch.dtype, Literal["float32", "bfloat16", "float16"]]
    names = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
    return names[dtype]


def device_name(device: torch.device) -> str:
    """As its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "xpu":
        return str(torch.xpu.get_device_name(device))
    return "Apple GPU" if device.type == "mps" else platform.processor()


def total_bytes(device: torch.device) -> int | None:
    """Memory of a GPU of its own; None on a CPU, and on an Apple GPU, which shares the CPU's."""
    if device.type in ("cuda", "xpu"):
        return int(getattr(torch, device.type).get_device_properties(device).total_memory)
    return None


def free_bytes(device: torch.device) -> int | None:
    """Memory of a GPU that nobody holds; None where the driver does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "xpu":
        total = total_bytes(device) or 0
        return total - int(torch.xpu.memory_reserved(device))
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return None


def out_of_memory(error: BaseException) -> OutOfMemory | None:
    """Return what a user is told where a device has too little memory; None for other errors."""
    of_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    if not of_cpu and not isinstance(error, torch.OutOfMemoryError):
        return None
    return OutOfMemory(
        str(error).splitlines()[0],
        "room for all of it; `--dry-run` of a run prints its plan",
        "close other programs that use the device, or lower train.micro_batch_size or "
        "sample.batch_size to 1, with which a run goes on (--resume RUN); in a new run also "
        "compute.vae_tile or data.resolution",
    )


def release(device: torch.device) -> None:
    """Give freed memory, which torch or the C library keeps, back to whoever counts what is
    free.
    """
    if device.type == "cpu":
        give_back()
    else:
        getattr(torch, device.type).empty_cache()


def peak_bytes(device: torch.device) -> int | None:
    """Most memory that this process held so far: of the GPU on a GPU, else of the machine.

    None where the system does not count it.
    """
    if device.type in ("cuda", "xpu"):
        return int(getattr(torch, device.type).max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # kilobytes elsewhere
