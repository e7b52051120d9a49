"""Find files: those of the package (beside it in a clone, inside it when installed from a wheel),
the user's home and the cache.
"""

import contextlib
import os
import stat
import tempfile
from pathlib import Path

PACKAGE = Path(__file__).parent
NAME = "qzo_diffusion"


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


def expand_home(text: str) -> str:
    """`~/imgs` -> `/home/name/imgs`; other paths stay.

    Raises ValueError where `~` stands for nothing.
    """
    expanded = os.path.expanduser(text)
    if expanded in ("~", text) and (text == "~" or text.startswith("~/")):
        raise ValueError("a path without ~, since no home folder is known here")
    if not is_unicode(expanded):
        raise ValueError("a home folder whose name is UTF-8, or a path without ~")
    return expanded


def is_unicode(text: str) -> bool:
    """False for what stands for bytes that are no UTF-8, in arguments and names of files."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def cache_folder() -> Path:
    """Return the folder for data that can be computed again: below XDG_CACHE_HOME, or ~/.cache, or
    a temporary folder of this user alone if neither can be written.
    """
    asked = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(asked):  # a relative one is to be ignored, by the XDG specification
        return Path(asked) / NAME
    home = os.path.expanduser("~")
    if os.path.isabs(home) and _can_be_made(Path(home) / ".cache" / NAME):
        return Path(home) / ".cache" / NAME
    temporary = Path(tempfile.gettempdir())
    if not hasattr(os, "getuid"):  # Windows, where the temporary folder is the user's own
        return temporary / NAME
    return _private_folder(temporary / f"{NAME}-{os.getuid()}")


def _can_be_made(folder: Path) -> bool:
    there = next(place for place in (folder, *folder.parents) if place.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _private_folder(path: Path) -> Path:
    """`path`, made for this user alone; where somebody else made it, a new one."""
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    facts = path.lstat()
    ours = stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid()
    if ours and not facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return path
    return Path(tempfile.mkdtemp(prefix=f"{NAME}-"))
