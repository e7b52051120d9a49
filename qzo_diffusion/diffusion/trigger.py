"""Find the word that calls a style in captions, and put it into prompts."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

FEWEST = 3  # different captions that must share a part, before it counts as a trigger
_LAST = re.compile(r",\s*(?=[^,]+$)|\s+(?=in\s+\S[^,]*\bstyle\b[^,]*$)", re.IGNORECASE)
_FIRST = re.compile(r"^[^,]+,\s*")


@dataclass(frozen=True)
class Trigger:
    """`word` as captions hold it, and the text before and after a prompt that adds it."""

    word: str
    before: str = ""
    after: str = ""

    def added(self, prompt: str) -> str:
        return prompt if self.is_in(prompt) else f"{self.before}{prompt}{self.after}"

    def is_in(self, prompt: str) -> bool:
        return re.search(rf"(?<!\w){re.escape(self.word)}(?!\w)", prompt) is not None


def find_trigger(captions: Sequence[str], word: str | None = None) -> Trigger | None:
    """Return the trigger that at least half of the captions hold, or None.

    Without `word` it is the last or the first part that all captions share ("..., ink wash", "...
    in ink style", "inkwash, ..."). At least three different captions must share it.
    """
    different = sorted({caption.strip() for caption in captions if caption.strip()})
    if word is None:
        return _shared_part(different) if len(different) >= FEWEST else None
    plain = Trigger(word, after=f", {word}")
    if 2 * sum(map(plain.is_in, captions)) < max(1, len(captions)):
        return None
    shared = _shared_part([caption for caption in different if plain.is_in(caption)])
    if shared is None or not plain.is_in(shared.before + shared.after):
        return plain
    return Trigger(word, shared.before, shared.after)


def with_and_without(prompts: Sequence[str], trigger: Trigger | None) -> list[str]:
    """Add the trigger to every second prompt; change none if one holds it already."""
    if trigger is None or any(map(trigger.is_in, prompts)):
        return list(prompts)
    return [prompt if index % 2 else trigger.added(prompt) for index, prompt in enumerate(prompts)]


def _shared_part(captions: Sequence[str]) -> Trigger | None:
    """Return the part that all captions end with, or else begin with, with its separator."""
    last = {_tail(caption) for caption in captions}
    if len(last) == 1 and (tail := last.pop()):
        return Trigger(tail.strip(" ,"), after=tail)
    first = {match[0] if (match := _FIRST.match(caption)) else "" for caption in captions}
    if len(first) == 1 and (head := first.pop()):
        return Trigger(head.strip(" ,"), before=head)
    return None


def _tail(caption: str) -> str:
    found = _LAST.search(caption)
    return caption[found.start() :] if found else ""
