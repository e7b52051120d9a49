"""Locks of open files: `fcntl`'s, `msvcrt`'s on Windows, and none where a system has neither."""

import os
from typing import Any

try:
    import fcntl
except ImportError:
    fcntl: Any = None  # type: ignore[no-redef]
try:
    import msvcrt
except ImportError:
    msvcrt: Any = None  # type: ignore[no-redef]

# Windows lets nobody read what another process locked, so that a byte far behind every file's end
# is locked.
FAR = 2**40


def lock(descriptor: int, shared: bool = False) -> None:
    """Lock an open file until it is closed, and don't wait. Windows has exclusive locks alone.

    Raises:
        BlockingIOError: another one has it.
        OSError: a file system without locks.
    """
    if fcntl is not None:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    elif msvcrt is not None:
        _lock_on_windows(descriptor)


def _lock_on_windows(descriptor: int) -> None:
    windows: Any = msvcrt
    at = os.lseek(descriptor, 0, os.SEEK_CUR)
    try:
        os.lseek(descriptor, FAR, os.SEEK_SET)
        windows.locking(descriptor, windows.LK_NBLCK, 1)
    except PermissionError as error:
        raise BlockingIOError(error.errno, "another process has it") from None
    finally:
        os.lseek(descriptor, at, os.SEEK_SET)
