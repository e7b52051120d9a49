"""Prompt files: one prompt a line, lines that begin with # are comments, empty lines are passed
over.
"""

from pathlib import Path

from qzo_diffusion.core.errors import DataError
from qzo_diffusion.diffusion.captions import PLACEHOLDER


def read_prompts(path: Path, trigger: str | None = None) -> list[str]:
    """The prompts in their order; `[trigger]` in them is replaced.

    Raises:
        DataError: no such file, not text in UTF-8, no prompt in it, or a placeholder without a
            trigger.
    """
    expected = "a text file with one prompt a line"
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} can't be read: {error}", expected, "give --prompts or --sample-prompts a file"
        ) from None
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise DataError(f"no prompt in {path}", expected, "write at least one prompt into it")
    return with_trigger(prompts, trigger, str(path))


def with_trigger(prompts: list[str], trigger: str | None, place: str) -> list[str]:
    """The prompts with `trigger` for `[trigger]`; `place` says in a message where they stand.

    Raises:
        DataError: a placeholder without a trigger.
    """
    marked = [prompt for prompt in prompts if PLACEHOLDER in prompt]
    if marked and not trigger:
        raise DataError(
            f"{PLACEHOLDER} in {place}: {marked[0]!r}",
            "a trigger word to put there",
            "pass --trigger WORD to train, or write the word itself",
        )
    return [prompt.replace(PLACEHOLDER, trigger or "") for prompt in prompts]
