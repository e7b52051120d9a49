"""Processes that start Python anew, for what depends on their environment; `tests/forked.py` has
the quicker ones.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    """A Python process on one thread; its stdout and stderr can be read."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        **pipes,
    )


def kill_all(processes: list[subprocess.Popen[str]]) -> None:
    """Stopped ones too; waits for their end and closes their pipes."""
    for process in processes:
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
