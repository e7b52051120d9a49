"""The process of a `python:` reward: python -m qzo_diffusion.rewards.worker FILE FUNCTION

A line of stdin names a folder of pictures, as JSON. A line of stdout answers with {"values": [...]}
or {"error": text}. What the function prints goes to stderr.
"""

import contextlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def load(file: Path, name: str) -> Callable[..., Any]:
    """Return a function of a Python file."""
    spec = importlib.util.spec_from_file_location("reward", file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file.name} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.parent))
    spec.loader.exec_module(module)
    function = getattr(module, name)
    if not callable(function):
        raise TypeError(f"{name} is no function")
    return function


def values_of(function: Callable[..., Any], folder: Path) -> list[float]:
    """Return the function's values for the pictures of a folder."""
    from PIL import Image

    rows = json.loads((folder / "prompts.json").read_text("utf-8"))
    pictures = [Image.open(folder / row["file"]).convert("RGB") for row in rows]
    return [float(value) for value in function(pictures, [row["prompt"] for row in rows])]


def answer(work: Callable[[], dict[str, Any]], out: Any) -> bool:
    """Write what `work` returns, or its error, as a line; return whether it was no error."""
    try:
        found = work()
    except Exception as error:  # a user's code may raise anything
        found = {"error": f"{type(error).__name__}: {error}"}
    out.write(json.dumps(found) + "\n")
    out.flush()
    return "error" not in found


def main(file: str, name: str) -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    functions: list[Callable[..., Any]] = []

    def begin() -> dict[str, Any]:
        functions.append(load(Path(file), name))
        return {"ready": name}

    with contextlib.suppress(BrokenPipeError):
        if not answer(begin, out):
            return
        for line in sys.stdin:
            folder = Path(json.loads(line))
            answer(lambda at=folder: {"values": values_of(functions[0], at)}, out)  # type: ignore[misc]


if __name__ == "__main__":
    main(*sys.argv[1:])
