"""Turn rows of data into examples with prompts, then into tokens, then into padded batches.

Every example becomes one row of tokens, or one for each choice, and a list of places where the
model's prediction is read. If every choice is a single token, all choices are read after the one
prompt: one forward pass per example instead of one per choice.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from qzo_diffusion.core.errors import DataError
from qzo_diffusion.core.noise import derive_key
from qzo_diffusion.llm.causal_lm import CausalLm, padded
from qzo_diffusion.llm.data_files import Row
from qzo_diffusion.llm.kept_hidden import KeptHidden
from qzo_diffusion.llm.task_file import TaskSpec, fields_of, fill
from qzo_diffusion.system.texts import check_tokens


@dataclass(frozen=True)
class Example:
    """A prompt, its possible continuations, and the right one. For generated text, `answers` are
    all that count as right.
    """

    prompt: str
    continuations: tuple[str, ...]
    label: int
    answers: tuple[str, ...]
    place: str


def make_examples(spec: TaskSpec, rows: Sequence[Row]) -> list[Example]:
    """Make an example of each row.

    Raises:
        DataError: a label is none of the task's choices.
    """
    return [_example(spec, row) for row in rows]


def _example(spec: TaskSpec, row: Row) -> Example:
    text = fill(spec.template, row.values)
    if spec.choices is not None:
        values, found = list(spec.choices), row.values[spec.label or ""]
        if found not in values:
            raise DataError(
                f"{row.place}: {spec.label} = {found!r}",
                f"one of {', '.join(values)}",
                "correct the data or `choices` of the task",
            )
        texts = tuple(spec.choices.values())
        return Example(text, texts, values.index(found), (texts[values.index(found)],), row.place)
    if spec.answer is not None:
        name = next((name for name in fields_of(spec.answer) if name in row.alternatives), None)
        said = row.alternatives[name] if name else ("",)
        answers = tuple(
            fill(spec.answer, row.values | ({name: one} if name else {})) for one in said
        )
        return Example(text, answers[:1], 0, tuple(answer.strip() for answer in answers), row.place)
    return Example("", (text,), 0, (), row.place)


def choose_rows(
    rows: Sequence[Row], counts: Sequence[int | None], seed: int, name: str
) -> list[list[Row]]:
    """Choose disjoint random sets of `counts` rows each, in the order of the file; None takes all
    that are left.

    The order is drawn from the seed and the file's name alone, so the first rows do not depend on
    how many follow.
    """
    bits = np.random.Philox(key=derive_key(seed, "split", name))
    order = np.argsort(bits.random_raw(len(rows)), kind="stable").tolist()
    chosen, start = [], 0
    for count in counts:
        stop = len(rows) if count is None else min(len(rows), start + count)
        chosen.append([rows[index] for index in sorted(order[start:stop])])
        start = stop
    return chosen


@dataclass(frozen=True)
class Encoded:
    """One example as tokens.

    rows: one for each choice, or a single one. reads: (position, token) pairs for each row; the
    probability of `token` after `position` is read. shared: every choice is one token, and all are
    read in the one row. prompt: the tokens of the prompt alone, for generated answers. cut: the
    number of dropped tokens.
    """

    rows: tuple[tuple[int, ...], ...]
    reads: tuple[tuple[tuple[int, int], ...], ...]
    label: int
    shared: bool
    prompt: tuple[int, ...]
    answers: tuple[str, ...]
    cut: int

    @property
    def length(self) -> int:
        return max(map(len, self.rows))


def encode(lm: CausalLm, examples: Sequence[Example], max_tokens: int | None) -> list[Encoded]:
    """Tokenize all examples. A prompt with continuation above `max_tokens` loses its beginning.

    Raises:
        DataError: a token without an embedding, a continuation without a token, or, without
            `max_tokens`, texts longer than the model reads (counted).
    """
    if not examples:
        return []
    check_tokens(
        lm.tokenizer,
        lm.vocabulary,
        ((one.place, one.prompt + text) for one in examples for text in one.continuations),
        "the model",
    )
    split = [_split(lm, example) for example in examples]
    single = all(len(tail) == 1 for _, tails in split for tail in tails) and len(split[0][1]) > 1
    limit = min(lm.context, max_tokens or lm.context)
    lengths = [len(head) + max(map(len, tails)) - single for head, tails in split]
    too_long = Counter(length > limit for length in lengths)[True]
    if too_long and max_tokens is None:
        raise DataError(
            f"{too_long} of {len(examples)} prompts are longer than the model reads, the "
            f"longest {max(lengths)} tokens",
            f"at most {lm.context} tokens",
            f"cut them with data.max_tokens={lm.context}; the beginning is left out",
        )
    start = lm.tokenizer.bos_token_id
    return [
        _encoded(example, head, tails, single, max(0, length - limit), first=int(head[0] == start))
        for example, (head, tails), length in zip(examples, split, lengths, strict=True)
    ]


def _split(lm: CausalLm, example: Example) -> tuple[list[int], list[list[int]]]:
    """Return the tokens that all continuations share, and the rest of each.

    Prompt and continuation are tokenized together: a word may join over the border.
    """
    prompt = lm.encode(example.prompt) if example.prompt else []
    whole = [lm.encode(example.prompt + text) for text in example.continuations]
    start = 0
    while start < len(prompt) and all(
        start < len(ids) and ids[start] == prompt[start] for ids in whole
    ):
        start += 1
    start = max(start, 1)  # nothing comes before the first token to predict it from
    for text, ids in zip(example.continuations, whole, strict=True):
        if len(ids) <= start:
            what = "adds no token to its prompt" if example.prompt else "is too short to learn from"
            raise DataError(
                f"{example.place}: {text!r} {what}",
                "a text of at least one token behind the prompt, or of two without one",
                "correct `choices`, `answer` or `template` of the task, or the data",
            )
    return whole[0][:start], [ids[start:] for ids in whole]


def _encoded(
    example: Example,
    head: list[int],
    tails: list[list[int]],
    shared: bool,
    too_many: int,
    first: int,
) -> Encoded:
    """Drop `too_many` tokens of the prompt after the `first` ones.

    If the prompt is too short, as in plain text, the end is dropped.
    """
    cut = min(too_many, len(head) - max(first, 1))
    kept = (*head[:first], *head[first + cut :])
    if shared:
        places = tuple((len(kept) - 1, tail[0]) for tail in tails)
        return Encoded((kept,), (places,), example.label, True, kept, example.answers, cut)
    longest = len(kept) + max(map(len, tails)) - (too_many - cut)
    rows = tuple((*kept, *tail)[:longest] for tail in tails)
    reads = tuple(tuple((at - 1, row[at]) for at in range(len(kept), len(row))) for row in rows)
    return Encoded(rows, reads, example.label, False, kept, example.answers, too_many)


@dataclass(frozen=True)
class Batch:
    """B examples of R / B rows each, side by side.

    ids [R, T]; positions [R, P], or [R, 1] where all tokens are read at one place; tokens and mask
    [R, P]; label [B]. prompts [B, S], padded on the left, with prompt_mask, for generated answers.
    shared: as in `Encoded`. probes_per_forward: how often the same examples are in it. hidden [R,
    T, D]: the output of the untrained first blocks, if it is known.
    """

    ids: Tensor
    positions: Tensor
    tokens: Tensor
    mask: Tensor
    label: Tensor
    prompts: Tensor
    prompt_mask: Tensor
    answers: tuple[tuple[str, ...], ...]
    shared: bool
    probes_per_forward: int = 1
    hidden: Tensor | None = None

    def __len__(self) -> int:
        return len(self.label)

    def repeated(self, times: int) -> "Batch":
        """Return all examples `times` times: all of them, then all of them again."""
        copied = self._with(lambda tensor: torch.cat([tensor] * times), self.answers * times)
        return replace(copied, probes_per_forward=times * self.probes_per_forward)

    def to(self, device: torch.device) -> "Batch":
        return self._with(lambda tensor: tensor.to(device), self.answers)

    def _with(
        self, change: Callable[[Tensor], Tensor], answers: tuple[tuple[str, ...], ...]
    ) -> "Batch":
        tensors = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **tensors, answers=answers)  # type: ignore[arg-type]


def make_batch(lm: CausalLm, encoded: Sequence[Encoded], kept: KeptHidden | None = None) -> Batch:
    rows = [row for one in encoded for row in one.rows]
    reads = [read for one in encoded for read in one.reads]
    shared = encoded[0].shared
    places = [[position for position, _ in (read[:1] if shared else read)] for read in reads]
    prompts = [one.prompt for one in encoded]
    return Batch(
        ids=padded(rows, lm.padding),
        positions=padded(places, 0),
        tokens=padded([[token for _, token in read] for read in reads], 0),
        mask=padded([[1] * len(read) for read in reads], 0).float(),
        label=torch.tensor([one.label for one in encoded]),
        prompts=padded(prompts, lm.padding, left=True),
        prompt_mask=padded([[1] * len(prompt) for prompt in prompts], 0, left=True),
        answers=tuple(one.answers for one in encoded),
        shared=shared,
        hidden=None if kept is None else kept.of(rows),
    ).to(lm.device)


def by_length(encoded: Sequence[Encoded], size: int) -> list[list[int]]:
    """Return indices in groups of at most `size` with about equal lengths, so that little of a
    batch is padding.
    """
    order = sorted(range(len(encoded)), key=lambda index: (encoded[index].length, index))
    return [order[start : start + size] for start in range(0, len(order), size)]
