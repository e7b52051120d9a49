"""JSON files of other people, read within limits: length, depth and kind are checked."""

import json
from pathlib import Path
from typing import Any

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.system.reading import unique

LONGEST = 32 * 2**20  # bytes; the index of a model of 700 GB has 9 MB
TOO_DEEP = "it is nested too deeply"


def read_object(file: Path, kind: str, remedy: str = "download the model again") -> dict[str, Any]:
    """The JSON object of a file.

    Args:
        kind: names the file's content in an error, such as "the config of a model".

    Raises:
        ModelError: the file is missing, too long, damaged, or holds no object.
    """
    try:
        size = file.stat().st_size
        if size > LONGEST:
            raise ValueError(f"it has {size} bytes, more than {LONGEST}")
        content = parsed_object(file.read_bytes())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ModelError(f"{file} can't be read: {reason}", kind, remedy) from None
    return content


def parsed_object(text: bytes) -> dict[str, Any]:
    """Raises ValueError for text that is no JSON object, is nested too deeply or repeats a key."""
    try:
        content = json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not an object")
    return content
