"""Memory that the C library keeps after it was freed.

glibc keeps freed blocks of up to 32 MB in its heap, and the holes that small tensors leave between
them count as used: 2.2 GB on the way back of SD3.5 Large."""

import ctypes
import sys


def give_back() -> bool:
    """Give freed pages back to the system. Returns whether there were any; False as well where the
    C library has no such call.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    return trim is not None and bool(trim(0))
