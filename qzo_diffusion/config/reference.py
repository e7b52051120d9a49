"""docs/settings.md, from the settings and the rules themselves:

python -m qzo_diffusion.config.reference > docs/settings.md
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from qzo_diffusion.config.defaults import PICTURES, TEXTS, Rule
from qzo_diffusion.config.described import all_settings, condition, value_in_words

INTRODUCTION = """# Settings

This page is written by `python -m qzo_diffusion.config.reference`.

Every setting has a default. Values come from a preset or a YAML file (`--preset`, `--config`), then
from flags, then from `section.key=value`; later ones win, and a note says so where one setting is
given twice on the command line. `qzo-diffuse validate --config FILE` checks a file and shows it
with all defaults. `qzo-diffuse settings WORD` shows the settings of this page whose names hold a
word, or that another trainer calls so.

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
    head = ("setting", "runs on", "default", "values", "unit", "meaning", "example")
    table = [
        (
            f"`{one.key}`",
            one.runs_on,
            f"{one.default}, or by a rule below" if any(one.rules.values()) else one.default,
            one.values,
            one.unit,
            one.meaning,
            f"`{one.example}`",
        )
        for one in all_settings()
    ]
    yield from _rows(head, table)


def _rules(table: Sequence[Rule]) -> Iterator[tuple[str, ...]]:
    for where, same in groupby(table, key=condition):
        for at, rule in enumerate(same):
            yield ("" if at else where, f"`{rule.setting}`", value_in_words(rule))


def _rows(head: Sequence[str], rows: Any) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


if __name__ == "__main__":
    print(page(), end="")
