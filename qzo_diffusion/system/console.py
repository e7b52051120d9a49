"""The terminal: results go to stdout as JSON, everything else to stderr."""

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from qzo_diffusion.system import escape

DONE, MENDABLE, INTERRUPTED = 0, 2, 130
"""Exit codes: done; the user can mend it; stopped by Ctrl-C or SIGTERM."""

WARNING = "warning:"  # begins a message that `--quiet` shows, too
_quiet: ContextVar[bool] = ContextVar("quiet", default=False)


@contextlib.contextmanager
def quiet(on: bool) -> Iterator[None]:
    """Show warnings, results and errors alone while open, if `on`."""
    before = _quiet.set(on)
    try:
        yield
    finally:
        _quiet.reset(before)


def is_quiet() -> bool:
    return _quiet.get()


def is_shown(text: str) -> bool:
    """Whether a message on the way is for this user."""
    return not is_quiet() or text.startswith(WARNING)


def report(text: str) -> None:
    """One message for a person, on stderr, without control characters."""
    if is_shown(text):
        _print(text)


def ask(text: str) -> None:
    """A message on stderr that needs a person, with `--quiet`, too."""
    _print(text)


def show(text: str) -> None:
    """A result for a person, on stdout, without control characters."""
    print(escape.terminal(text))


def emit(results: Mapping[str, Any], as_json: bool, text: str) -> None:
    """The end of a verb: `results` as strict JSON on stdout, or `text` on stderr."""
    from qzo_diffusion.system.files import finite

    if as_json:
        print(json.dumps(finite(results), allow_nan=False))
    else:
        _print(text)


def _print(text: str) -> None:
    print(escape.terminal(text), file=sys.stderr, flush=True)
