"""Flags that are no settings: numbers in their ranges, and paths, checked when the command is
read.
"""

import argparse
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from qzo_diffusion import resources
from qzo_diffusion.core.errors import ConfigError
from qzo_diffusion.system.console import report

EXPECTED = "expected"  # in a message about a value: what stands behind it
MOST_STRENGTH = 100.0
USUAL_STRENGTHS = (0.0, 1.5)  # beyond them pictures fall apart, so that it is said


class Parser(argparse.ArgumentParser):
    """Takes no abbreviated flags, and tells of flags that are given twice; its verbs, too."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})
        for name in (None, "store"):
            self.register("action", name, StoreLast)

    def error(self, message: str) -> NoReturn:
        """Tells what is wrong as all other mistakes are told. Raises ConfigError."""
        got, found, expected = message.partition(f"{EXPECTED} ")
        verb = f"{self.prog} --help" if " " in self.prog else f"{self.prog} VERB --help"
        usual = f"flags and settings as `{verb}` lists them"
        raise ConfigError(got.rstrip(": "), expected if found else usual, f"see `{verb}`")


class StoreLast(argparse.Action):
    """Keeps the last of several values, and says so where they differ."""

    def __call__(
        self, parser: argparse.ArgumentParser, options: argparse.Namespace, values: Any, *_: Any
    ) -> None:
        given = vars(options).setdefault("_given", {})
        if self.option_strings and self.dest in given:
            flag = self.option_strings[0]
            note_double([(flag, given[self.dest]), (flag, values)])
        given[self.dest] = values
        setattr(options, self.dest, values)


def note_double(given: Iterable[tuple[str, Any]]) -> None:
    """Later ones win, so that a script's settings can be changed behind it; but not unseen."""
    seen: dict[str, Any] = {}
    for name, value in given:
        if name in seen and str(seen[name]) != str(value):
            report(
                f"note: {name} is given twice, as {seen[name]!r} and as {value!r}; the last counts"
            )
        seen[name] = value


def check_names(arguments: Sequence[str]) -> None:
    """Raises ConfigError where an argument, or the name of the current folder, is no UTF-8 or no
    name: files that say where something is could not be written.
    """
    for text in (*arguments, _current_folder()):
        if not resources.is_unicode(text):
            raise ConfigError(
                f"{os.fsencode(text)!r}",
                "names and texts in UTF-8, the current folder's name as well",
                "rename the file or the folder, or give it another path by a link",
            )


def _current_folder() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:
        raise ConfigError(
            "a current folder that was deleted", "one that is there", "cd to another folder"
        ) from None


def _number(
    kind: Callable[[str], Any], least: float, most: float, words: str
) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:  # not of NaN either
            raise argparse.ArgumentTypeError(f"{text}: {EXPECTED} {words}")
        return value

    return parse


seed = _number(int, 0, 2**63 - 1, f"a whole number from 0 to {2**63 - 1}")
whole = _number(int, 0, 2**63 - 1, "a whole number, 0 or more")
count = _number(int, 1, 2**31 - 1, "a whole number, 1 or more")
not_negative = _number(float, 0.0, 1e308, "a finite number, 0 or more")
level = _number(float, 0.0, 1.0, "a noise level from 0 to 1")
strength = _number(
    float, -MOST_STRENGTH, MOST_STRENGTH, f"a number from {-MOST_STRENGTH:g} to {MOST_STRENGTH:g}"
)


def unusual(value: float, name: str) -> str | None:
    """A warning where a strength or a weight is beyond those that pictures survive."""
    low, high = USUAL_STRENGTHS
    if low <= value <= high:
        return None
    return f"warning: {name} {value:g} is outside {low:g} to {high:g}; pictures may fall apart"


def path_text(text: str) -> str:
    """A path with `~` written out, as text: it may be a name instead."""
    try:
        if not text.strip():
            raise ValueError("a path")
        return resources.expand_home(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {EXPECTED} {error}") from None


def path(text: str) -> Path:
    return Path(path_text(text))


def weighted(text: str) -> tuple[Path, float]:
    """`outputs/run=0.5` -> (Path("outputs/run"), 0.5). The last `=` counts, since a folder's name
    may hold one.
    """
    place, equals, weight = text.rpartition("=")
    if not equals or not place:
        raise argparse.ArgumentTypeError(f"{text}: {EXPECTED} RUN=WEIGHT, as in outputs/ink=0.7")
    return path(place), strength(weight)
