"""How far some work is: a bar on a terminal, and a line every half minute in a log."""

import math
import os
import sys
import time
from typing import Any

from tqdm import tqdm

from qzo_diffusion.system.console import is_quiet

SECONDS_A_LINE = 30.0
LINE = "{desc}: {n_fmt} of {total_fmt}, {elapsed} passed, {remaining} left{postfix}"


class Progress(tqdm):
    """tqdm's bar, with all of its arguments, where stderr is a terminal.

    Elsewhere (a file, a pipe, a cluster's log) it writes whole lines: one every SECONDS_A_LINE
    seconds, and a last one where the bar would stay (`leave`). Work that is done before the first
    of them is not mentioned. TQDM_DISABLE, `--quiet` and `disable` show nothing.
    """

    def __init__(self, *args: Any, disable: bool = False, **options: Any) -> None:
        self._in_lines = not _is_terminal()
        self._last_line = time.monotonic()
        if self._in_lines:
            options["bar_format"] = LINE
        options["disable"] = disable or is_disabled()
        super().__init__(*args, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if not self._in_lines:
            super().display(msg, pos)
        elif time.monotonic() - self._last_line >= SECONDS_A_LINE:
            self._write_line()

    def clear(self, *args: Any, **options: Any) -> None:
        if not self._in_lines:
            super().clear(*args, **options)

    def close(self) -> None:
        # tqdm closes a bar twice, and one whose making failed
        if getattr(self, "_in_lines", False) and not getattr(self, "disable", True):
            if self.leave:
                self._write_line()
            self.delay = math.inf  # for tqdm it was never shown, so that there is nothing to clear
        super().close()

    def _write_line(self) -> None:
        self._last_line = time.monotonic()
        self.fp.write(f"{self}\n")
        self.fp.flush()


def is_disabled() -> bool:
    """Whether the user wants no progress: by `--quiet`, or by tqdm's own variable, which tqdm
    itself reads since 4.66, and then once, when it is imported.
    """
    return is_quiet() or os.environ.get("TQDM_DISABLE", "") not in ("", "0")


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()
