"""`qzo-diffuse settings`: look settings up by a part of their names."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from qzo_diffusion.commands.flags import add_output
from qzo_diffusion.system.console import DONE, show

if TYPE_CHECKING:
    from qzo_diffusion.config.described import Setting


def add(verbs: Any) -> None:
    settings = verbs.add_parser(
        "settings", help="look settings up: meaning, unit, default, example"
    )
    settings.add_argument(
        "pattern",
        nargs="?",
        metavar="PATTERN",
        help="a part of a name, 'data.*', another trainer's name, or a word of the meaning; "
        "default: a line for each setting",
    )
    add_output(settings)
    settings.set_defaults(verb=run)


def run(options: argparse.Namespace) -> int:
    from qzo_diffusion.config.described import all_settings, find

    found = all_settings() if options.pattern is None else find(options.pattern)
    if options.json:
        print(json.dumps([one.as_dict() for one in found]))
    elif options.pattern is None:
        width = max(len(one.key) for one in found)
        show("\n".join(_plain(f"{one.key:<{width}}  {one.meaning}") for one in found))
    else:
        show("\n\n".join(map(as_text, found)))
    return DONE


def as_text(setting: "Setting") -> str:
    """A paragraph on one setting."""
    runs = "pictures and texts" if setting.runs_on == "both" else setting.runs_on
    lines = [
        f"{setting.key}  (runs on {runs})",
        f"  {setting.meaning}",
        f"  values   {setting.values}",
        f"  unit     {setting.unit}",
        f"  default  {setting.default}",
    ]
    for kind, rules in setting.rules.items():
        lines += [f"           {kind}, {condition}: {value}" for value, condition in rules]
    return _plain("\n".join([*lines, f"  example  {setting.example}"]))


def _plain(text: str) -> str:
    """Without Markdown's marks of code."""
    return text.replace("`", "")
