"""Losses of a batch, one per example, and metrics of a task.

A loss need not have a gradient, since two forward passes suffice to compare it: 1 - accuracy and 1
- F1 are offered as well.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from qzo_diffusion.llm.causal_lm import CausalLm
from qzo_diffusion.llm.task_file import Metric, TaskSpec
from qzo_diffusion.llm.tasks import Batch

ObjectiveName = Literal["loss", "accuracy", "f1"]
ARTICLES = re.compile(r"\b(a|an|the)\b")


def choice_scores(lm: CausalLm, batch: Batch) -> Tensor:
    """Return the mean log-probability of the tokens of each continuation, fp32 [B, C].

    Single-token choices are compared by their logits, which differ from log-probabilities by the
    same number for all choices.
    """
    scores = lm.score(
        batch.ids,
        batch.positions,
        batch.tokens,
        normalize=not batch.shared,
        probes_per_forward=batch.probes_per_forward,
        hidden=batch.hidden,
    )
    if batch.shared:
        return scores
    means = (scores * batch.mask).sum(1) / batch.mask.sum(1)
    return means.view(len(batch), -1)


def task_loss(lm: CausalLm, batch: Batch) -> Tensor:
    """Return [B]: cross-entropy over the choices, or the mean negative log-probability of the
    tokens of the answer or text.
    """
    scores = choice_scores(lm, batch)
    return (
        -scores[:, 0]
        if scores.shape[1] == 1
        else F.cross_entropy(scores, batch.label, reduction="none")
    )


def task_metric(lm: CausalLm, batch: Batch, spec: TaskSpec, metric: Metric) -> Tensor:
    """Return [B]: 1 for right and 0 for wrong; for generated answers also the F1 of words; a loss
    stays one.
    """
    if metric == "loss":
        return task_loss(lm, batch)
    if spec.kind == "choice":
        return (choice_scores(lm, batch).argmax(1) == batch.label).float()
    said = lm.answers(batch.prompts, batch.prompt_mask, spec.answer_tokens, spec.stop)
    measure = word_f1 if metric == "f1" else exact_match
    best = [
        max(measure(text, answer) for answer in answers)
        for text, answers in zip(said, batch.answers, strict=True)
    ]
    return torch.tensor(best, device=batch.label.device)


def objective(lm: CausalLm, spec: TaskSpec, name: ObjectiveName) -> Callable[[Batch], Tensor]:
    """Return the loss that training minimizes."""
    if name == "loss":
        return lambda batch: task_loss(lm, batch)
    return lambda batch: 1 - task_metric(lm, batch, spec, name)


@torch.no_grad()
def mean_metric(lm: CausalLm, batches: Sequence[Batch], spec: TaskSpec) -> float:
    """Return the mean metric over all examples of all batches."""
    values = [
        value for batch in batches for value in task_metric(lm, batch, spec, spec.metric).tolist()
    ]
    return sum(values) / len(values)


def normalized(text: str) -> list[str]:
    """Split a text into words as SQuAD does (Rajpurkar et al. 2016): no case, no punctuation, no
    articles.
    """
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return ARTICLES.sub(" ", plain).split()


def word_f1(text: str, answer: str) -> float:
    said, wanted = normalized(text), normalized(answer)
    if not said or not wanted:
        return float(said == wanted)
    common = sum((Counter(said) & Counter(wanted)).values())
    return 2 * common / (len(said) + len(wanted))


def exact_match(text: str, answer: str) -> float:
    return float(normalized(text) == normalized(answer))
