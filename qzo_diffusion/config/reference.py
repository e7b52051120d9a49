"""docs/settings.md, from the settings and the rules themselves:

python -m qzo_diffusion.config.reference > docs/settings.md
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from qzo_diffusion.config import kinds
from qzo_diffusion.config.defaults import NORMALISED, NOT_GIVEN, PICTURES, TEXTS, Formula, Rule
from qzo_diffusion.config.llm import LlmConfig
from qzo_diffusion.config.sections import usual
from qzo_diffusion.config.style import Config

INTRODUCTION = """# Settings

This page is written by `python -m qzo_diffusion.config.reference`.

Every setting has a default. Values come from a preset or a YAML file (`--preset`, `--config`), then
from flags, then from `section.key=value`; later ones win, and a note says so where one setting is
given twice on the command line. `qzo-diffuse validate --config FILE` checks a file and shows it
with all defaults.

* A YAML file has sections, or dotted keys (`train.lr: 0.05`). A setting that stands twice in it is
  an error.
* A text is taken as it is: `'data.caption=artwork #3: ink'`, `data.trigger=007` and
  `data.trigger=null` need no further quotation marks, and `sample.negative_prompt=` is an empty
  text. For a path or a device that may be none, the word `null` means none.
* In a YAML file `007` and `yes` are texts as well; `null`, `~` or nothing means none. Write
  `"null"` for the word.
* Other values are YAML: `train.lr=1e-3`, `qzo.layers=[ff.net, attn]`, `data.resolution=null`.
* `~` at the beginning of a path is the home folder, in files and flags alike. A run's config.yaml
  holds whole paths.
* Caches are in `data.cache_dir`, or else below `$XDG_CACHE_HOME`, `~/.cache`, or a temporary folder
  of the user alone.
* `qzo.patch_groups` is another name for `qzo.regions`, and `middle` another word for `quiet` in
  `qzo.layers`.
"""
RULES = """
## Defaults that follow from other settings

A rule holds where every setting on the left has the value there and the setting on the right was
not given. Rules apply from top to bottom; the first that holds wins.
"""


def page() -> str:
    """docs/settings.md as a whole."""
    parts = [INTRODUCTION, "## All settings\n", *_settings(), RULES]
    for name, table in (("Pictures", PICTURES), ("Texts", TEXTS)):
        parts += [f"### {name}\n", *_rows(("where", "setting", "value"), _rules(table)), ""]
    return "\n".join(parts).rstrip() + "\n"


def _settings() -> Iterator[str]:
    pictures, texts = kinds.fields(Config), kinds.fields(LlmConfig)
    keys = sorted({**pictures, **texts}, key=lambda key: ("." in key, key.partition(".")[0]))
    table = []
    for key in keys:
        fields = [kind[key] for kind in (pictures, texts) if key in kind]
        runs = "both" if len(fields) == 2 else "pictures" if key in pictures else "texts"
        values = " / ".join(dict.fromkeys(map(in_words, fields)))
        table.append((f"`{key}`", runs, _default(key), values, _meaning(fields)))
    yield from _rows(("setting", "runs on", "default", "values", "meaning"), table)


def _default(key: str) -> str:
    found = [shown(usual(kind)[key]) for kind in (Config, LlmConfig) if key in usual(kind)]
    default = " / ".join(dict.fromkeys(found))
    follows = any(rule.setting == key for rule in [*PICTURES, *TEXTS])
    return f"{default}, or by a rule below" if follows else default


def _meaning(fields: Sequence[FieldInfo]) -> str:
    """Return the meaning for the last kind of runs, which has all values of the others."""
    return " ".join((fields[-1].description or "").split())


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


def _rules(table: Sequence[Rule]) -> Iterator[tuple[str, ...]]:
    for condition, same in groupby(table, key=lambda rule: _condition(rule)):
        for at, rule in enumerate(same):
            value = rule.value.words if isinstance(rule.value, Formula) else shown(rule.value)
            yield ("" if at else condition, f"`{rule.setting}`", value)


def _condition(rule: Rule) -> str:
    parts = [_equals(key, value) for key, value in rule.when.items()]
    return ", ".join(parts) or "otherwise"


def _equals(key: str, value: Any) -> str:
    if value is NOT_GIVEN:
        return f"`{key}` is not given"
    if value == NORMALISED:
        return f"`{key}` is on"
    choices = value if isinstance(value, tuple) else (value,)
    return f"`{key}` is {' or '.join(shown(one) for one in choices)}"


def _rows(head: Sequence[str], rows: Any) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


if __name__ == "__main__":
    print(page(), end="")
