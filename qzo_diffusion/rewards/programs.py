"""Rewards that a user brings: a function of a Python file, or any program.

Both run as the user, with all of the user's rights, in a process of their own that is stopped at
the time limit.
"""

import contextlib
import json
import math
import os
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from qzo_diffusion.rewards.reward import RewardError, checked

GO_ON = "correct it, then go on with --resume"
SECONDS_TO_END = 5.0
LAST_LINES = 5  # of a program's messages in an error


class Program:
    """Run a program once a call: a folder in, a number a line out.

    The folder holds 000.png, 001.png, ... and prompts.json, a list of {file, prompt}. It is the
    last argument. A line that says nan leaves out its picture.

    Args:
        command: the program and its arguments.
        seconds: time limit of a call.
    """

    def __init__(self, command: Sequence[str], seconds: float) -> None:
        self._command, self._seconds = list(command), seconds

    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        with tempfile.TemporaryDirectory(prefix="qzo-reward-") as folder:
            write_pictures(Path(folder), pictures, prompts)
            text = self._output([*self._command, folder])
        lines = [line for line in text.splitlines() if line.strip()]
        return checked(shlex.join(self._command), lines, len(pictures))  # type: ignore[arg-type]

    def _output(self, command: Sequence[str]) -> str:
        name = shlex.join(self._command)
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except OSError as error:
            raise RewardError(
                f"the reward {name} can't be started: {error.strerror}", "a program", GO_ON
            ) from None
        try:
            output, messages = process.communicate(timeout=self._seconds)
        except subprocess.TimeoutExpired:
            _stop(process)
            raise _too_long(name, self._seconds) from None
        except BaseException:
            _stop(process)
            raise
        if process.returncode:
            last = "\n".join(messages.splitlines()[-LAST_LINES:])
            raise RewardError(
                f"the reward {name} ended with {process.returncode}: {last}", "an end with 0", GO_ON
            )
        return output


def _too_long(name: str, seconds: float) -> RewardError:
    return RewardError(
        f"the reward {name} ran longer than {seconds:g} seconds",
        "an answer within reward.seconds",
        "raise reward.seconds or make it quicker, then go on with --resume",
    )


def _stop(process: "subprocess.Popen[str]") -> None:
    """End a program that has not ended, and everything that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def _close(process: "subprocess.Popen[str]") -> None:
    """Let a process end that ends with its input."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(OSError):
        process.stdin.close()
    try:
        process.wait(timeout=SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        _stop(process)
    process.stdout.close()


def write_pictures(folder: Path, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> None:
    """Write the pictures as PNG, and a table of their prompts."""
    names = [f"{at:03d}.png" for at in range(len(pictures))]
    for name, picture in zip(names, pictures, strict=True):
        picture.save(folder / name)
    rows = [{"file": name, "prompt": text} for name, text in zip(names, prompts, strict=True)]
    (folder / "prompts.json").write_text(json.dumps(rows), encoding="utf-8")


class PythonFunction:
    """Call a function of a Python file: (PIL images, prompts) -> floats.

    Its process lives as long as the run, so that a model is loaded once. Where the function raises
    for a call of several pictures, it is called for each alone, and only those that fail are left
    out.

    Raises:
        RewardError: the file has no such function, or can't be run.
    """

    def __init__(self, file: Path, function: str, seconds: float) -> None:
        self._name, self._seconds = f"{file.name}:{function}", seconds
        self._process = subprocess.Popen(
            [sys.executable, "-m", "qzo_diffusion.rewards.worker", str(file), function],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        weakref.finalize(self, _close, self._process)
        started = self._read()
        if "error" in started:
            raise RewardError(
                f"the reward {self._name}: {started['error']}",
                "FILE.py:FUNCTION, a function of pictures and prompts",
                "correct the file or the name of the function",
            )

    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """Raises RewardError where the function fails for every picture, gives another number of
        values, or takes too long."""
        answer = self._answer(pictures, prompts)
        if "values" in answer:
            return checked(self._name, answer["values"], len(pictures))
        alone = [
            self._answer([picture], [prompt]) if len(pictures) > 1 else answer
            for picture, prompt in zip(pictures, prompts, strict=True)
        ]
        if not any("values" in one for one in alone):
            raise RewardError(f"the reward {self._name} raised {answer['error']}", "numbers", GO_ON)
        return [checked(self._name, one.get("values", [math.nan]), 1)[0] for one in alone]

    def _answer(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, Any]:
        """Return {"values": [...]} or {"error": text}."""
        with tempfile.TemporaryDirectory(prefix="qzo-reward-") as folder:
            write_pictures(Path(folder), pictures, prompts)
            assert self._process.stdin is not None
            try:
                self._process.stdin.write(json.dumps(folder) + "\n")
                self._process.stdin.flush()
            except OSError:
                raise self._ended() from None
            return self._read()

    def _read(self) -> dict[str, Any]:
        """Return the next answer, one line of JSON."""
        assert self._process.stdout is not None
        end, line = time.monotonic() + self._seconds, b""
        place = self._process.stdout.fileno()
        while not line.endswith(b"\n"):
            left = end - time.monotonic()
            if left <= 0 or not select.select([place], [], [], left)[0]:
                _stop(self._process)
                raise _too_long(self._name, self._seconds)
            part = os.read(place, 2**16)
            if not part:
                raise self._ended()
            line += part
        found: dict[str, Any] = json.loads(line)
        return found

    def _ended(self) -> RewardError:
        code = self._process.wait()
        got = f"the process of the reward {self._name} ended with {code}"
        return RewardError(got, "a function that returns", GO_ON)
