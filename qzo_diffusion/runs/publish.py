"""Prepare settings and texts of a run for other people: without local paths, and without the names
of the user and of the machine.
"""

import contextlib
import getpass
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from qzo_diffusion.config.files import make_config
from qzo_diffusion.config.sections import RunConfig

# a whole value: /home/a/b, ~/b, C:\a\b, \\host\b, ../b, file:///home/a
_PLACE = re.compile(r"(file:)?(/|~[^/\s]*/|~$|[A-Za-z]:[\\/]|\\\\|\.\.?[\\/])")
# inside a text: the same after a space, a quote, a bracket or an equals sign
_INSIDE = re.compile(
    r"(?:(?<=[\s\"'(\[=:,])|^)(?:file:)?(?:/(?=[^\s/])|~[\w.-]*/|[A-Za-z]:[\\/](?!/)|\\\\)"
    r"[^\s\"')\],;]*"
)
_FREE_TEXT = {"caption", "trigger", "negative_prompt", "text", "prompt"}  # written by a user
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_CACHED = re.compile(r"models--([A-Za-z0-9][\w.-]*?)--([\w.-]+)")
_SECRET = re.compile(r"TOKEN|SECRET|PASSW|API_?KEY|CREDENTIAL|PROXY", re.IGNORECASE)
_TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,})")
_CREDENTIALS = re.compile(r"://[^/\s@:]+(?::[^/\s@]*)?@")
SHORTEST_SECRET = 8  # characters of a value; shorter ones are "1" or "no"
SHORTEST = 3  # characters of a user's or machine's name that is removed from texts
_ORDINARY = {"auto", "localhost", "none", "root", "tiny", "user", "users", "home", "data"}


def published(value: Any, key: str = "") -> Any:
    """Return `value`, a setting or a mapping of settings, in a form for others.

    A local path becomes its last name; the names of the user and of the machine become "-". Text
    that a user wrote for pictures (captions, prompts, the trigger) loses only the home folder.
    """
    if isinstance(value, Mapping):
        return {name: published(inner, str(name)) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [published(inner, key) for inner in value]
    if isinstance(value, Path):
        value = str(value)
    if not isinstance(value, str):
        return value
    name = key.rpartition(".")[2]
    if name in _FREE_TEXT:
        return _without_home(without_secrets(value))
    if name == "cache_dir":
        return None  # it exists on this machine alone
    if name == "model":
        return published_model(value)
    return _without_names(last_name(value) if _is_place(value) else published_text(value))


def published_config(config: RunConfig) -> str:
    """Return the settings as YAML that this program reads."""
    return make_config(published(config.model_dump()), type(config)).to_yaml()


def published_facts(facts: Mapping[str, str]) -> dict[str, str]:
    """Return metadata of a safetensors file, which holds texts only."""
    return {name: str(published(value, name)) for name, value in facts.items()}


def published_text(text: str) -> str:
    """Return a sentence without the local paths in it."""
    return _without_names(_INSIDE.sub(lambda match: last_name(match[0]), _without_home(text)))


def without_secrets(text: str) -> str:
    """Remove secrets from a text: values of environment variables for tokens, passwords and
    proxies, and user and password in an address.
    """
    for name, value in os.environ.items():
        if _SECRET.search(name) and len(value) >= SHORTEST_SECRET:
            text = text.replace(value, "***")
    return _TOKEN.sub("***", _CREDENTIALS.sub("://***@", text))


def published_model(model: str) -> str:
    """Return a Hub id, the name of an embedded model, or the last part of a local path."""
    named = base_id(model) or (model if model == "tiny" else _without_names(last_name(model)))
    return without_secrets(named)


def base_id(model: str) -> str | None:
    """Return the Hub id that a `--model` means, also for a folder in the Hub's cache.

    Return None for any other folder or file and for an embedded model.
    """
    cached = _CACHED.search(model)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    is_id = _HUB_ID.fullmatch(model) and not Path(model).exists()
    return model if is_id and Path(model).suffix != ".gguf" else None


def last_name(path: str) -> str:
    """Return the last part of a path of any system; "." if it has none."""
    text = _without_home(path.removeprefix("file:"))
    return PureWindowsPath(text.rstrip("/\\")).name or "."


def _is_place(value: str) -> bool:
    """Return whether all of `value` is one path, spaces included."""
    if "\n" in value or len(_INSIDE.findall(value)) > 1:
        return False
    return _PLACE.match(value) is not None or ("/" in value and Path(value).exists())


def _without_home(text: str) -> str:
    try:
        home = str(Path.home())
    except RuntimeError:
        return text
    return re.sub(rf"{re.escape(home)}(?=[/\\]|\W|$)", "~", text) if len(home) > 1 else text


def _without_names(text: str) -> str:
    text = without_secrets(text)
    for name in _names():
        text = re.sub(rf"(?<![\w]){re.escape(name)}(?![\w])", "-", text, flags=re.IGNORECASE)
    return text


def _names() -> list[str]:
    """Return the names of this machine and this user, unless they are ordinary words."""
    host = socket.gethostname()
    found = [host, host.partition(".")[0]]
    with contextlib.suppress(OSError, KeyError, ImportError):
        found.append(getpass.getuser())
    with contextlib.suppress(RuntimeError):
        found.append(Path.home().name)
    return sorted(
        {name for name in found if len(name) >= SHORTEST and name.lower() not in _ORDINARY},
        key=len,
        reverse=True,
    )
