"""Every setting as a person reads of it: values, unit, default, meaning, example and rules."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from qzo_diffusion.config import kinds
from qzo_diffusion.config.defaults import (
    GIVEN,
    NORMALISED,
    NOT_GIVEN,
    PICTURES,
    TEXTS,
    Formula,
    Rule,
)
from qzo_diffusion.config.examples import EXAMPLES
from qzo_diffusion.config.llm import LlmConfig
from qzo_diffusion.config.names import ELSEWHERE, suggestion
from qzo_diffusion.config.sections import NEW_KEYS, usual
from qzo_diffusion.config.style import Config
from qzo_diffusion.core.errors import ConfigError

TABLES = {"pictures": PICTURES, "texts": TEXTS}


@dataclass(frozen=True)
class Setting:
    """All that there is to know of a setting, in Markdown.

    runs_on: "pictures", "texts" or "both".
    rules: kind of run -> (value, condition) for each rule that gives it another default.
    """

    key: str
    runs_on: str
    default: str
    values: str
    unit: str
    meaning: str
    example: str
    rules: Mapping[str, Sequence[tuple[str, str]]]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def all_settings() -> list[Setting]:
    """In order of sections, those without one first."""
    pictures, texts = kinds.fields(Config), kinds.fields(LlmConfig)
    keys = sorted({**pictures, **texts}, key=lambda key: ("." in key, key.partition(".")[0]))
    return [
        _described(
            key,
            "both"
            if key in pictures and key in texts
            else "pictures"
            if key in pictures
            else "texts",
            [kind[key] for kind in (pictures, texts) if key in kind],
        )
        for key in keys
    ]


def find(pattern: str) -> list[Setting]:
    """The settings that a pattern with * and ?, a part of a name or another trainer's name means;
    where no name does, those whose meaning holds it.

    Raises ConfigError where there are none.
    """
    known, word = all_settings(), pattern.lower()
    of_others = {key for key, names in ELSEWHERE.items() if word in names.split()}
    of_others |= {old for new, old in NEW_KEYS.items() if word in new}
    named = [one for one in known if _names(word, one.key) or one.key in of_others]
    found = named or [one for one in known if word in one.meaning.lower()]
    if not found:
        raise ConfigError(
            f"no setting for {pattern!r}",
            "a part of a name or of a meaning, or a pattern such as 'data.*'",
            suggestion(pattern, [one.key for one in known]),
        )
    return found


def _names(word: str, key: str) -> bool:
    return fnmatchcase(key, word) if set(word) & set("*?[") else word in key


def _described(key: str, runs_on: str, fields: Sequence[FieldInfo]) -> Setting:
    """`fields`: of picture runs, then of text runs; the last has all values of the others."""
    unit, example = EXAMPLES[key]
    return Setting(
        key,
        runs_on,
        _default(key),
        " / ".join(dict.fromkeys(map(in_words, fields))),
        unit,
        " ".join((fields[-1].description or "").split()),
        example,
        {name: _rules_of(key, table) for name, table in TABLES.items()},
    )


def _default(key: str) -> str:
    found = [shown(usual(kind)[key]) for kind in (Config, LlmConfig) if key in usual(kind)]
    return " / ".join(dict.fromkeys(found))


def _rules_of(key: str, table: Sequence[Rule]) -> list[tuple[str, str]]:
    return [(value_in_words(rule), condition(rule)) for rule in table if rule.setting == key]


def shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if value == "":
        return "an empty text"
    return f"`{value}`" if isinstance(value, str) else str(value).replace("'", "")


def in_words(field: FieldInfo) -> str:
    """The values that a setting takes: `a whole number, 1 or more; null`."""
    parts = kinds.parts(field)
    words = [word for part in parts for word in _words(part, parts)]
    limits = [limit for part in parts for limit in _limits(part)]
    return "; ".join([*words, *limits, *(["null"] if kinds.may_be_none(field) else [])])


def _words(part: Any, parts: Sequence[Any]) -> Iterator[str]:
    if get_origin(part) is Literal:
        yield ", ".join(shown(value) for value in get_args(part))
    elif get_origin(part) is list:
        yield "a list of texts" if get_args(part)[0] is str else "a list of numbers"
    elif part is str:
        yield "a path" if any(isinstance(other, kinds.Place) for other in parts) else "a text"
    elif part in (bool, int, float):
        yield {bool: "true, false", int: "a whole number", float: "a number"}[part]


def _limits(mark: Any) -> Iterator[str]:
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤", "multiple_of": "multiple of"}
    marks = mark.metadata if isinstance(mark, FieldInfo) else [mark]
    for one in marks:
        for name, sign in signs.items():
            if hasattr(one, name) and getattr(one, name) is not None:
                yield f"{sign} {_power(getattr(one, name))}"


def _power(limit: float) -> str:
    return "2^63" if limit == 2**63 else f"{limit:g}"


def value_in_words(rule: Rule) -> str:
    return rule.value.words if isinstance(rule.value, Formula) else shown(rule.value)


def condition(rule: Rule) -> str:
    """`method` is `quzo`, `quant.type` is `int8`"""
    parts = [_equals(key, value) for key, value in rule.when.items()]
    return ", ".join(parts) or "otherwise"


def _equals(key: str, value: Any) -> str:
    if value is NOT_GIVEN:
        return f"`{key}` is not given"
    if value is GIVEN:
        return f"`{key}` is given"
    if value == NORMALISED:
        return f"`{key}` is on"
    choices = value if isinstance(value, tuple) else (value,)
    return f"`{key}` is {' or '.join(shown(one) for one in choices)}"
