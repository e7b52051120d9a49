"""Read prompt files: one prompt a line. Lines that begin with # are comments; empty lines are
skipped.

Kohya's trainers put options behind a prompt. `--n TEXT` is read as the negative prompt of its line.
All other options (`--w`, `--h`, `--d`, `--l`, `--s`, ...) are dropped with a note, since pictures
of one grid share their size, steps and guidance.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qzo_diffusion.core.errors import DataError
from qzo_diffusion.diffusion.captions import PLACEHOLDER
from qzo_diffusion.diffusion.listing import listed
from qzo_diffusion.diffusion.text_file import decode, has_controls, split_lines
from qzo_diffusion.system.texts import check_encodable

_EXPECTED = "a text file with one prompt a line"
_LARGEST = 2**24  # bytes
_OPTION = re.compile(r"(?:^|\s)--(n|w|h|d|s|l|g|t|i|am|ow|oh|ss|fs|cn|ctr|nf)(?=\s|$)")
_MEANT = {
    "w": "data.resolution",
    "h": "data.resolution",
    "d": "sample.seed",
    "s": "sample.steps",
    "l": "sample.guidance",
}


@dataclass(frozen=True)
class Prompt:
    """One prompt. negative: the line's own negative prompt, None if it has none. place: file and
    line.
    """

    text: str
    negative: str | None = None
    place: str = ""

    @property
    def row(self) -> dict[str, str]:
        """Return the prompt for a table of pictures."""
        own = {} if self.negative is None else {"negative_prompt": self.negative}
        return {"prompt": self.text, **own}


@dataclass(frozen=True)
class Prompts:
    """Prompts in their order, and remarks for the user on how they were read."""

    prompts: list[Prompt]
    notes: list[str] = field(default_factory=list)

    @property
    def texts(self) -> list[str]:
        return [prompt.text for prompt in self.prompts]

    @property
    def negatives(self) -> list[str]:
        """The negative prompts that lines have of their own."""
        return [prompt.negative for prompt in self.prompts if prompt.negative is not None]


def read_prompt_file(path: Path, trigger: str | None = None) -> Prompts:
    """Read the prompts of a file in their order, with `trigger` in place of `[trigger]`.

    Raises:
        DataError: the file is missing, is not text, holds no prompt, or has a placeholder without
            a trigger.
    """
    text, encoding = _text(path)
    lines = [
        (f"{path}, line {number}", line)
        for number, line in enumerate(split_lines(text), start=1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    if not lines:
        raise DataError(f"no prompt in {path}", _EXPECTED, "write at least one prompt into it")
    found = parse_prompts(lines, trigger)
    notes = [f"{path} is not UTF-8, read as {encoding}"] if encoding else []
    return Prompts(found.prompts, notes + found.notes)


def parse_prompts(lines: Sequence[tuple[str, str]], trigger: str | None) -> Prompts:
    """Parse (place, line) pairs.

    Raises:
        DataError: a placeholder without a trigger, options without a prompt, or text that can't be
            encoded.
    """
    prompts, left_out = [], dict[str, list[str]]()
    for place, line in lines:
        check_encodable(line, place)
        _check_trigger(line, trigger, place)
        text, *options = _OPTION.split(line.strip())
        if not text.strip():
            raise DataError(f"{place}: no prompt before {line.strip()!r}", _EXPECTED, "write one")
        pairs = list(zip(options[::2], options[1::2], strict=True))
        negative = next((value for name, value in pairs if name == "n"), None)
        own = None if negative is None else _filled(negative, trigger)
        prompts.append(Prompt(_filled(text, trigger), own, place))
        for name, _ in pairs:
            if name != "n":
                left_out.setdefault(name, []).append(place.rpartition(", ")[2])
    return Prompts(prompts, _notes(left_out))


def _text(path: Path) -> tuple[str, str | None]:
    try:
        if path.stat().st_size > _LARGEST:
            raise OSError(f"{path.stat().st_size} bytes, more than {_LARGEST}")
        text, encoding = decode(path.read_bytes())
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from None
    if has_controls(text) or "\ufffd" in text:
        raise _unreadable(path, "it is no text in UTF-8")
    return text, encoding


def _unreadable(path: Path, reason: str) -> DataError:
    return DataError(
        f"{path} can't be read: {reason}", _EXPECTED, "give --prompts or --sample-prompts a file"
    )


def _check_trigger(line: str, trigger: str | None, place: str) -> None:
    if PLACEHOLDER in line and not trigger:
        raise DataError(
            f"{PLACEHOLDER} in {place}: {line!r}",
            "a trigger word to put there",
            "pass --trigger WORD to train, or write the word itself",
        )


def _filled(text: str, trigger: str | None) -> str:
    return text.strip().replace(PLACEHOLDER, trigger or "")


def _notes(left_out: dict[str, list[str]]) -> list[str]:
    if not left_out:
        return []
    parts = []
    for name, places in left_out.items():
        meant = f"; {_MEANT[name]} sets it" if name in _MEANT else ""
        parts.append(f"--{name} ({listed(places)}{meant})")
    return [f"options behind prompts are left out: {', '.join(parts)}"]
