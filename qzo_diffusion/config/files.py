"""Settings from files, flags and `key=value`, and the errors that say what is wrong with them."""

import argparse
import difflib
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from qzo_diffusion import resources
from qzo_diffusion.config.defaults import set_dotted
from qzo_diffusion.config.sections import RunConfig, Section
from qzo_diffusion.config.style import Config
from qzo_diffusion.core.errors import ConfigError

Flags = dict[str, tuple[str, str]]
"""Flags that are settings by another name: flag -> (key, help)."""

AnyConfig = TypeVar("AnyConfig", bound=RunConfig)


def resolve_settings(
    options: argparse.Namespace, resumed: Path | None, flags: Flags, kind: Any
) -> Any:
    """The config of a `train` call: the resumed run's, preset or file, then flags, then key=value;
    later ones win.
    """
    preset = getattr(options, "preset", None)
    if bool(preset) + bool(options.config) + (resumed is not None) > 1:
        raise ConfigError(
            "more than one of --preset, --config, --resume and --run",
            "one of them",
            "leave the others out",
        )
    settings: dict[str, Any] = {}
    if resumed is not None:
        settings = read_yaml(resumed / "config.yaml")
    elif preset:
        name = f"{preset}.yaml"
        if not (resources.shipped("configs") / name).is_file():
            known = sorted(file.stem for file in resources.shipped("configs").glob("*.yaml"))
            raise ConfigError(
                f"no preset {preset!r}", f"one of {', '.join(known)}", "choose one of them"
            )
        settings = read_yaml(resources.shipped("configs") / name)
    elif options.config:
        settings = read_yaml(resources.find_file(options.config, "configs"))
    for flag, (key, _) in flags.items():
        value = getattr(options, flag.removeprefix("--").replace("-", "_"))
        if value is not None:
            set_dotted(settings, key, value)
    if getattr(options, "strict", False):
        set_dotted(settings, "data.strict", True)
    overrides = [parse_override(text, kind) for text in options.settings]
    if resumed is not None and any(key == "train.lr" for key, _ in overrides):
        # a rate that somebody chose is taken as it is
        set_dotted(settings, "train.calibrate_lr", False)
    for key, value in overrides:
        set_dotted(settings, key, value)
    return make_config(settings, kind)


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """All dotted keys: `data.batch_size`, `train.lr`, ..."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, Section):
            keys += known_keys(annotation, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def changed_settings(before: RunConfig, after: RunConfig) -> list[str]:
    """`key: old -> new` for every setting that differs."""
    flat = [_flatten(config.model_dump()) for config in (before, after)]
    return [
        f"{key}: {flat[0][key]!r} -> {flat[1][key]!r}"
        for key in flat[0]
        if flat[0][key] != flat[1][key]
    ]


def _flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= (
            _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: no such file, not text, not YAML, or not a mapping.
    """
    remedy = "see configs/ for files that work"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"no file {path}", "a YAML file with settings", remedy) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} can't be read: {error}", "a YAML file in UTF-8", remedy
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}", "key: value lines", remedy) from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path} holds a {type(content).__name__}", "a mapping of sections", remedy
        )
    return content


def parse_override(text: str, kind: type[RunConfig] = Config) -> tuple[str, Any]:
    """`train.max_steps=10` -> ("train.max_steps", 10); the value is YAML.

    Raises:
        ConfigError: no `=`, an unknown key, or a value that is not YAML.
    """
    key, equals, raw = text.partition("=")
    if not equals or not key:
        raise ConfigError(
            f"argument {text!r}",
            "section.key=value, for example train.lr=1e-3",
            "write it as key=value",
        )
    if key not in known_keys(kind):
        raise unknown_key(key, kind)
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{key}={raw!r}: {error}", "a plain YAML value", f"quote it: '{key}=\"...\"'"
        ) from None
    return key, value


def unknown_key(key: str, kind: type[RunConfig] = Config) -> ConfigError:
    known = known_keys(kind)
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    tail = difflib.get_close_matches(
        key.split(".")[-1], [k.split(".")[-1] for k in known], n=1, cutoff=0.7
    )
    same_tail = [k for k in known if tail and k.split(".")[-1] == tail[0]]
    guess = close or same_tail
    remedy = (
        f"did you mean {guess[0]!r}?"
        if guess
        else "see `qzo-diffuse train --help` and configs/ for the keys"
    )
    return ConfigError(f"unknown setting {key!r}", "a known one", remedy)


def make_config(settings: dict[str, Any], kind: type[AnyConfig] = Config) -> AnyConfig:  # type: ignore[assignment]
    """Check a nested mapping of settings.

    Raises:
        ConfigError: the first thing that is wrong, with its dotted key.
    """
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        raise _explain(error, kind) from None


def load_config(path: Path, kind: type[AnyConfig] = Config) -> AnyConfig:  # type: ignore[assignment]
    return make_config(read_yaml(path), kind)


def _explain(error: ValidationError, kind: type[RunConfig]) -> ConfigError:
    errors = error.errors()
    first, key = errors[0], _key(errors[0]["loc"])
    if first["type"] == "extra_forbidden":
        return unknown_key(key, kind)
    # A setting of several kinds has an error for each: all of them say what it may be.
    expected = [
        one["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        for one in errors
        if _key(one["loc"]) == key
    ]
    remedy = f"correct {key or 'the settings'} and start again"
    return ConfigError(
        f"{key or 'settings'} = {first['input']!r}", " or ".join(dict.fromkeys(expected)), remedy
    )


# which pydantic adds to the name of a setting of several kinds
KINDS = ("constrained", "int", "float", "str", "list[", "literal[")


def _key(place: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in place if not str(part).startswith(KINDS))
