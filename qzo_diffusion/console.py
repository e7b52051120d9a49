"""The terminal: results go to stdout as JSON, everything else to stderr."""

import json
import sys
from collections.abc import Mapping
from typing import Any


def report(text: str) -> None:
    """One message for a person, on stderr."""
    print(text, file=sys.stderr, flush=True)


def emit(results: Mapping[str, Any], as_json: bool, text: str) -> None:
    """The end of a verb: `results` as JSON on stdout, or `text` on stderr."""
    if as_json:
        print(json.dumps(results))
    else:
        report(text)
