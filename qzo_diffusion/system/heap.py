"""How the C library keeps large blocks of memory.

glibc maps blocks from 128 KB on by themselves, and gives them back when they are freed. Each freed
one raises that limit, up to 32 MB. From then on layers' weights share a heap with small tensors
that stay, and its holes count as used: on the way back of SD3.5 Large 2.2 GB of them."""

import ctypes
import sys

MAP_FROM = -3  # M_MMAP_THRESHOLD of malloc.h
LARGE = 2**20  # bytes


def map_large_blocks() -> bool:
    """Give blocks from 1 MB on back when they are freed, from now on. Returns whether the C library
    has such a limit.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return bool(mallopt(MAP_FROM, LARGE)) if mallopt is not None else False
