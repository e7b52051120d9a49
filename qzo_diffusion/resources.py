"""Where the files that ship with the package are: beside it in a clone, inside it when installed
from a wheel.
"""

from pathlib import Path

PACKAGE = Path(__file__).parent


def shipped(folder: str) -> Path:
    """`configs` or `prompts`."""
    inside = PACKAGE / folder
    return inside if inside.is_dir() else PACKAGE.parent / folder


def tiny_model() -> Path:
    """The embedded model, a diffusers pipeline folder."""
    return PACKAGE / "models" / "tiny"


def embedded_scorer() -> Path:
    """The small CLIP that scores pictures of the embedded model, a folder in open_clip's format."""
    return PACKAGE / "models" / "scorer"


def find_file(name: str, folder: str) -> Path:
    """`name` as given, or the shipped file of that name where there is no such path."""
    path = Path(name)
    if path.exists():
        return path
    candidate = shipped(folder) / name.removeprefix(f"{folder}/")
    return candidate if candidate.exists() else path
