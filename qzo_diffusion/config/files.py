"""Settings from files, flags and `key=value`, and the errors that say what is wrong with them."""

import argparse
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from qzo_diffusion import resources
from qzo_diffusion.config import kinds
from qzo_diffusion.config.arguments import note_double
from qzo_diffusion.config.defaults import flat, set_dotted
from qzo_diffusion.config.llm import LlmConfig
from qzo_diffusion.config.names import suggestion
from qzo_diffusion.config.sections import NEW_KEYS, RunConfig
from qzo_diffusion.config.style import Config
from qzo_diffusion.core.errors import ConfigError
from qzo_diffusion.system import strict_yaml
from qzo_diffusion.system.console import report

Flags = dict[str, tuple[str, str]]
"""Flags that are settings by another name: flag -> (key, help)."""

AnyConfig = TypeVar("AnyConfig", bound=RunConfig)
VERBS: dict[type[RunConfig], str] = {Config: "qzo-diffuse train", LlmConfig: "qzo-diffuse llm"}
# Where the data lies, which a resumed run may find elsewhere: its content is compared.
DATA_PLACES = (
    "data.style_dir",
    "data.validation_dir",
    "data.dir",
    "data.cache_dir",
    "prior.prompts",
    "prior.dir",
    "reward.prompts",
)
MOST_SHOWN = 200  # characters of a value in a message


def resolve_settings(
    options: argparse.Namespace,
    resumed: Path | None,
    flags: Flags,
    kind: type[AnyConfig],
    start: Mapping[str, Any] | None = None,
    unused: Collection[str] = (),
) -> AnyConfig:
    """The config of a `train` call: `start` and the resumed run's, preset or file, then flags, then
    key=value; later ones win.

    Args:
        unused: keys of a preset or file that are for training, and not for this verb.
    """
    settings: dict[str, Any] = {}
    for part in (start or {}, _without(_settings_of_file(options, resumed), unused)):
        for key, value in flat(part).items():
            set_dotted(settings, key, value)
    given = [
        *_given_flags(options, flags),
        *(parse_override(text, kind) for text in options.settings),
    ]
    if resumed is not None and any(key == "train.lr" for key, _ in given):
        # a rate that somebody chose is taken as it is
        set_dotted(settings, "train.calibrate_lr", False)
    note_double(given)
    for key, value in given:
        set_dotted(settings, key, value)
    return make_config(settings, kind)


def _without(settings: dict[str, Any], unused: Collection[str]) -> dict[str, Any]:
    """Leave settings of training out, and say so."""
    given = flat(settings)
    if found := [f"{key}={given[key]}" for key in given if key in unused]:
        report(f"note: for training, and used here only if given as key=value: {', '.join(found)}")
    return {key: value for key, value in given.items() if key not in unused}


def _settings_of_file(options: argparse.Namespace, resumed: Path | None) -> dict[str, Any]:
    preset = getattr(options, "preset", None)
    if (preset is not None) + (options.config is not None) + (resumed is not None) > 1:
        raise ConfigError(
            "more than one of --preset, --config, --resume and --run",
            "one of them",
            "leave the others out",
        )
    if resumed is not None:
        return read_run(resumed / "config.yaml")
    if preset is not None:
        return read_yaml(_preset(preset))
    return {} if options.config is None else read_run(find_config(options.config))


def _preset(name: str) -> Path:
    shipped = {path.stem: path for path in resources.shipped("configs").glob("*.yaml")}
    if name not in shipped:
        known = ", ".join(sorted(shipped))
        raise ConfigError(f"no preset {name!r}", f"one of {known}", "choose one of them")
    return shipped[name]


def find_config(name: str) -> Path:
    """A YAML file, or a shipped one by its name, with or without `.yaml`."""
    path = Path(expanded(name, "--config"))
    if path.is_file():
        return path
    shipped = resources.find_file(f"{name.removesuffix('.yaml')}.yaml", "configs")
    if not shipped.is_file() and not path.exists():
        known = ", ".join(sorted(file.stem for file in resources.shipped("configs").glob("*.yaml")))
        raise ConfigError(
            f"no file {name}", f"a YAML file, or one of {known}", "correct the path or the name"
        )
    return shipped if shipped.is_file() else path


def expanded(text: str, name: str) -> str:
    """`~/a` as a whole path. Raises ConfigError where there is no home."""
    try:
        return resources.expand_home(text)
    except ValueError as error:
        raise ConfigError(f"{name} {text}", str(error), "write the whole path") from None


def _given_flags(options: argparse.Namespace, flags: Flags) -> Iterable[tuple[str, Any]]:
    for flag, (key, _) in flags.items():
        value = getattr(options, flag.removeprefix("--").replace("-", "_"))
        if value is not None:
            yield key, value
    if getattr(options, "strict", False):
        yield "data.strict", True
    if getattr(options, "reward", None):
        yield "reward.scores", options.reward


def known_keys(kind: type[RunConfig] = Config) -> list[str]:
    """All dotted keys: `data.batch_size`, `train.lr`, ..."""
    return list(kinds.fields(kind))


def kind_of(settings: dict[str, Any]) -> type[RunConfig]:
    """Return the kind of run that settings belong to: some are only for language runs."""
    given = set(flat(settings))
    texts, pictures = (set(known_keys(kind)) for kind in (LlmConfig, Config))
    of_texts = len(given & (texts - pictures)) + ("lora" in settings or "task" in settings)
    if settings.get("method") in ("mezo", "quzo-lora", "qlora"):
        of_texts += 1
    return LlmConfig if of_texts > len(given & (pictures - texts)) else Config


def changed_settings(
    before: RunConfig, after: RunConfig, unless: Collection[str] = ()
) -> list[str]:
    """`key: old -> new` for every setting that differs, but those of `unless`."""
    old, new = flat(before.model_dump()), flat(after.model_dump())
    places = {key for key, field in kinds.fields(type(before)).items() if kinds.place_of(field)}
    return [
        f"{key}: {old[key]!r} -> {new[key]!r}"
        for key in old
        if old[key] != new[key]
        and key not in unless
        and not (key in places and _same_place(old[key], new[key]))
    ]


def _same_place(before: str | None, after: str | None) -> bool:
    """Return whether a path that was stored as typed may be the whole path `after`."""
    if before is None or after is None or Path(before).is_absolute():
        return False
    parts = Path(before).parts
    return bool(parts) and Path(after).is_absolute() and Path(after).parts[-len(parts) :] == parts


def with_whole_paths(config: AnyConfig) -> AnyConfig:
    """A copy whose paths begin at the root, so that they hold from every folder; names of what
    ships, and Hub ids, stay.
    """
    resolved = config.model_copy(deep=True)
    for key, field in kinds.fields(type(config)).items():
        place, (section, _, name) = kinds.place_of(field), key.rpartition(".")
        owner = getattr(resolved, section) if section else resolved
        text = getattr(owner, name)
        if place is not None and text is not None:
            setattr(owner, name, kinds.absolute(text, place))
    return resolved


def read_yaml(path: Path) -> dict[str, Any]:
    """The sections in a YAML file; keys may be dotted, as in `train.lr: 0.05`.

    Raises:
        ConfigError: no such file, not text, not YAML, not a mapping, or a setting stands twice.
    """
    remedy = "see configs/ for files that work"
    try:
        document = strict_yaml.read(path.read_text(encoding="utf-8-sig"), _is_text)
    except FileNotFoundError:
        raise ConfigError(f"no file {path}", "a YAML file with settings", remedy) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} can't be read: {error}", "a YAML file in UTF-8", remedy
        ) from None
    except strict_yaml.YamlError as error:
        raise ConfigError(
            f"{path}: {error}", "key: value lines, each key once", f"correct it; {remedy}"
        ) from None
    if document.content is None:
        return {}
    if not isinstance(document.content, dict):
        raise ConfigError(
            f"{path} holds a {type(document.content).__name__}", "a mapping of sections", remedy
        )
    return _in_sections(document, path)


def _is_text(path: tuple[str, ...]) -> bool:
    return ".".join(path) in _texts()


@cache
def _texts() -> frozenset[str]:
    """Settings that are texts, of all kinds of runs."""
    return frozenset(
        key for kind in VERBS for key, field in kinds.fields(kind).items() if kinds.is_text(field)
    )


def _in_sections(document: strict_yaml.Document, path: Path) -> dict[str, Any]:
    """Dotted keys put into their sections. Raises ConfigError where one stands there already, by
    this name or an older one.
    """
    settings: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for place, value in _leaves(document.content):
        written = ".".join(place)
        key = NEW_KEYS.get(written, written)
        line = document.line_of(place)
        if key in lines:
            raise ConfigError(
                f"{path}: {key!r} stands twice, in line {lines[key]} and in line {line}",
                "each setting once",
                "leave one of them out",
            )
        lines[key] = line
        if isinstance(value, dict):  # an empty section
            settings.setdefault(key, {})
        else:
            set_dotted(settings, key, value)
    return settings


def _leaves(content: dict[Any, Any], place: tuple[str, ...] = ()) -> Iterable[tuple[Any, Any]]:
    for name, value in content.items():
        inner = (*place, str(name))
        if isinstance(value, dict) and value:
            yield from _leaves(value, inner)
        else:
            yield inner, value


def parse_override(text: str, kind: type[RunConfig] = Config) -> tuple[str, Any]:
    """`train.max_steps=10` -> ("train.max_steps", 10).

    A text is taken as it is, without YAML; other values are YAML. Of a path or a device that may be
    left out, `null` leaves it out; of a caption, a trigger and a negative prompt it is a word.

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
    key = NEW_KEYS.get(key, key)
    field = kinds.fields(kind).get(key)
    if field is None:
        raise unknown_key(key, kind)
    if kinds.is_text(field):
        left_out = raw == "null" and kinds.may_be_none(field) and not kinds.is_free(field)
        return key, None if left_out else raw
    try:
        return key, strict_yaml.read(raw).content
    except strict_yaml.YamlError as error:
        raise ConfigError(
            f"{key}={raw!r}: {error}", "a plain YAML value", "write a plain number, word or list"
        ) from None


def unknown_key(key: str, kind: type[RunConfig] = Config) -> ConfigError:
    other = next((verb for them, verb in VERBS.items() if key in known_keys(them)), None)
    section = key in {known.partition(".")[0] for known in known_keys(kind) if "." in known}
    if key in NEW_KEYS:
        remedy = f"it is {NEW_KEYS[key]!r} by another name; leave one of them out"
    elif section:
        remedy = f"it is a section; name one of its settings, as in {key}.NAME"
    elif other is not None and kind in VERBS:
        remedy = f"it is a setting of `{other}`; leave it out here"
    else:
        remedy = suggestion(key, known_keys(kind))
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


# Settings that came after the first runs, and do something by default: how a run without them ran.
CAME_LATER = {"prior.bound": None}
# A run's file names every setting that there was; nobody writes these down otherwise.
_NAMED_BY_RUNS = {"quant.type", "quant.skip", "quant.backend", "compute.device", "train.seed"}


def read_run(path: Path) -> dict[str, Any]:
    """Settings from a file; what an earlier version's run did not know is off."""
    settings = read_yaml(path)
    named = flat(settings)
    if set(named) >= _NAMED_BY_RUNS:
        for key, value in CAME_LATER.items():
            if key not in named:
                set_dotted(settings, key, value)
    return settings


def load_config(path: Path, kind: type[AnyConfig] = Config) -> AnyConfig:  # type: ignore[assignment]
    """Load the config of a run, or of an export of one."""
    return make_config(read_run(path), kind)


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
    together = first["type"] == "value_error" and isinstance(first["input"], dict | BaseModel)
    got = (
        f"settings{' of ' if key else ''}{key} that do not go together"
        if together
        else f"{key or 'settings'} = {_short(first['input'])}"
    )
    remedy = f"correct {key or 'the settings'} and start again"
    return ConfigError(got, " or ".join(dict.fromkeys(expected)), remedy)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


# which pydantic adds to the name of a setting of several kinds
KINDS = ("constrained", "int", "float", "str", "list[", "literal[", "function-after[")


def _key(place: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in place if not str(part).startswith(KINDS))
