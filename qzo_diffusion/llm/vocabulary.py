"""Check before a model is loaded that it has an embedding for every token of task and data."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.llm.causal_lm import load_tokenizer
from qzo_diffusion.llm.gguf_file import embedding_rows
from qzo_diffusion.llm.task_file import TaskSpec, literal_texts
from qzo_diffusion.llm.tasks import Example
from qzo_diffusion.quant.gguf_header import is_gguf
from qzo_diffusion.system.reading import read_json
from qzo_diffusion.system.texts import check_tokens


def check_vocabulary(folder: Path, task: str, spec: TaskSpec, examples: Sequence[Example]) -> None:
    """Tokenize the task's own words, then the examples.

    Args:
        folder: the folder of the model, or its GGUF file.
        task: name or file of the task, for the message.

    Raises:
        DataError: a token has no embedding; the message has its text, file and line.
        ModelError: the tokenizer can't be loaded.
    """
    size = _vocabulary_size(folder)
    if size is not None:
        texts = _texts(task, spec, examples)
        check_tokens(load_tokenizer(folder), size, texts, "the model")


def _texts(task: str, spec: TaskSpec, examples: Sequence[Example]) -> Iterator[tuple[str, str]]:
    yield from literal_texts(task, spec)
    for example in examples:
        for text in example.continuations:
            yield example.place, example.prompt + text


def _vocabulary_size(folder: Path) -> int | None:
    """Return the size of the vocabulary, None if the config does not say: only the model's code may
    know.
    """
    if is_gguf(folder):
        return embedding_rows(folder)
    try:
        config: Any = read_json(folder / "config.json")
        size = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{folder / 'config.json'} can't be read: {error}",
            "the config of a model",
            "download the model again",
        ) from None
    return size if isinstance(size, int) else None
