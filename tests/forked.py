"""Processes that have imported what a run needs before they begin.

A server process of the standard library imports it once and starts no thread; each process is a
fork of it. To fork the process of the tests would not do: a child of a process whose libraries have
threads hangs in its first parallel product.
"""

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.started import ROOT, free_port

MOST_SECONDS = 300  # a process that takes longer hangs

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["tests.preloaded"])


class Forked:
    """`target(*arguments)` in a process with that environment; what it returns is ignored.

    stdout goes where stderr does.
    """

    def __init__(self, target: Callable[..., object], *arguments: Any, **environment: str) -> None:
        handle, self._output = tempfile.mkstemp(prefix="forked-")
        os.close(handle)
        wanted = (self._output, environment, target, arguments)
        self._process = _server.Process(target=_begin, args=wanted, daemon=True)
        self._process.start()

    @property
    def returncode(self) -> int | None:
        """None while it goes on; the negative number of the signal that killed it."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> tuple[int, str]:
        """Its exit code and what it wrote. Raises TimeoutError, in seconds."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutError(f"still there after {timeout} s: {self.written()[-2000:]}")
        return self._process.exitcode, self.written()

    def written(self) -> str:
        return Path(self._output).read_text(errors="replace")

    def end(self) -> None:
        """Kills it, also where it was stopped, and removes what it wrote."""
        self._process.kill()
        self._process.join()
        os.unlink(self._output)


def ended(target: Callable[..., object], *arguments: Any) -> tuple[int, str]:
    """The exit code and the output of such a process, which is killed if it hangs."""
    process = Forked(target, *arguments)
    try:
        return process.wait(MOST_SECONDS)
    finally:
        process.end()


def started_ranks(commands: Sequence[tuple[Any, ...]]) -> list[Forked]:
    """One rank for each (target, *arguments), all of one run on this machine."""
    place = {"WORLD_SIZE": str(len(commands)), "MASTER_ADDR": "127.0.0.1"}
    place["MASTER_PORT"] = free_port()
    return [Forked(*command, RANK=str(rank), **place) for rank, command in enumerate(commands)]


def end_all(processes: list[Forked]) -> None:
    for process in processes:
        process.end()


def _begin(
    output: str, environment: dict[str, str], target: Callable[..., object], arguments: Any
) -> None:
    written = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(written, 1)
    os.dup2(written, 2)
    os.environ.update(environment)
    os.chdir(ROOT)
    target(*arguments)
