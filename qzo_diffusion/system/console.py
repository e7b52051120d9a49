"""The terminal: results go to stdout as JSON, everything else to stderr."""

import json
import sys
from collections.abc import Mapping
from typing import Any

from qzo_diffusion.system import escape

DONE, MENDABLE, INTERRUPTED = 0, 2, 130
"""Exit codes: done; the user can mend it; stopped by Ctrl-C or SIGTERM."""


def report(text: str) -> None:
    """One message for a person, on stderr, without control characters."""
    print(escape.terminal(text), file=sys.stderr, flush=True)


def show(text: str) -> None:
    """A result for a person, on stdout, without control characters."""
    print(escape.terminal(text))


def emit(results: Mapping[str, Any], as_json: bool, text: str) -> None:
    """The end of a verb: `results` as strict JSON on stdout, or `text` on stderr."""
    from qzo_diffusion.system.files import finite

    if as_json:
        print(json.dumps(finite(results), allow_nan=False))
    else:
        report(text)
