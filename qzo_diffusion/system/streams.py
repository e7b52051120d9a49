"""stdout and stderr that no text and no reader can break.

A character that their encoding lacks becomes an escape. Once a reader has gone away (`| head`, a
closed terminal) the rest is dropped without a word, and the work goes on: hours of training need no
reader. A descriptor that is closed (`2>&-`) is opened on the null device: the first file that is
written would get its number otherwise, and with it everything that libraries print.
"""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import Any

from qzo_diffusion.core.errors import OutputError

GONE = (errno.EPIPE, errno.ESHUTDOWN, errno.ECONNRESET, errno.EIO, errno.EBADF)


class Sink(io.RawIOBase):
    """Bytes for a descriptor until nobody takes them any more.

    Args:
        needed: whether a full disk is an error; progress on stderr is not worth one.

    Raises:
        OutputError: in `write`, once.
    """

    def __init__(self, descriptor: int, needed: bool) -> None:
        super().__init__()
        self._descriptor, self._needed, self._lost = descriptor, needed, False

    def write(self, data: Any) -> int:
        if self._lost:
            return len(data)
        try:
            return os.write(self._descriptor, data)
        except BlockingIOError:
            raise
        except OSError as error:
            self._lost = True
            if self._needed and error.errno not in GONE:
                raise OutputError(
                    f"the results can't be written: {error.strerror}",
                    "a stdout that takes them",
                    "free space, or send them elsewhere",
                ) from None
        return len(data)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)


@contextlib.contextmanager
def unbreakable() -> Iterator[None]:
    """Replace stdout and stderr while open, where they are the process's own."""
    _open_descriptors()
    before = sys.stdout, sys.stderr
    if sys.stdout is sys.__stdout__:
        sys.stdout = _stream(1, sys.stdout, needed=True)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _stream(2, sys.stderr, needed=False)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OutputError, OSError, ValueError):
                stream.flush()
        sys.stdout, sys.stderr = before


def _open_descriptors() -> None:
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one


def _stream(descriptor: int, like: io.TextIOWrapper | Any, needed: bool) -> io.TextIOWrapper:
    if like is not None:
        like.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(Sink(descriptor, needed)),
        encoding=getattr(like, "encoding", None) or "utf-8",
        errors="backslashreplace",
        line_buffering=descriptor == 2 or bool(getattr(like, "line_buffering", False)),
        write_through=bool(getattr(like, "write_through", False)),
    )
