"""What this process holds in memory, as the kernel counts it."""

import gc
from collections.abc import Callable
from pathlib import Path


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status: VmRSS is what is held now, VmHWM the most since the
    last `reset_peak`.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def reset_peak() -> None:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def peak_of(work: Callable[[], object]) -> int:
    """Peak resident bytes while `work` runs."""
    reset_peak()
    work()
    return resident("VmHWM")


# For a process whose peak is measured. Freed buffers go back at once, else the peak is that of the
# holes between them, which differ from run to run; slower.
FREED_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "262144"}
