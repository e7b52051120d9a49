"""Texts that no model reads: what can't be encoded, and tokens that it has no embedding for."""

from collections.abc import Iterable
from typing import Any

from qzo_diffusion.core.errors import DataError
from qzo_diffusion.resources import is_unicode


def check_encodable(text: str, place: str) -> None:
    """Raises DataError for half of a surrogate pair; `place` says where the text stands."""
    if not is_unicode(text):
        raise DataError(
            f"{place}: {_short(text)!a} holds half of a Unicode surrogate pair",
            "text that can be encoded as UTF-8",
            "write the character itself in its place, or take it out",
        )


def check_tokens(tokenizer: Any, size: int, texts: Iterable[tuple[str, str]], model: str) -> None:
    """Raise DataError for the first text with a token at or beyond the embedding.

    Tokens that were added to a tokenizer without resizing the model have such ids.

    Args:
        size: rows of the embedding.
        texts: (place, text).
        model: what the embedding belongs to, for the message.
    """
    if _largest_id(tokenizer) < size:
        return
    for place, text in texts:
        beyond = [token for token in tokenizer(text, verbose=False)["input_ids"] if token >= size]
        if beyond:
            name = tokenizer.convert_ids_to_tokens(beyond[0])
            raise DataError(
                f"{place}: token {name!r} has the id {beyond[0]}, for which {model} has no "
                f"embedding, in {_short(text)!r}",
                f"tokens with ids below {size}",
                "take it out of the text, or use a model that was resized to its tokenizer",
            )


def _largest_id(tokenizer: Any) -> int:
    return max(tokenizer.get_vocab().values(), default=-1)


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
