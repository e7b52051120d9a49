"""A prompt as a denoiser takes it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class EncodedPrompt:
    """An encoded prompt: embeds [T, D], and pooled [P], where P is 0 if a family has none.

    Where prompts differ in T, pooled is T itself, [1] int64. Zeros may follow those tokens.

    tokens: the longest count over the tokenizers.
    """

    embeds: Tensor
    pooled: Tensor
    tokens: int
    truncated: bool


def equally_long(embeds: Sequence[Tensor]) -> list[Tensor]:
    """Return prompts [B, T, D] with zeros behind the shorter ones."""
    longest = max(one.shape[1] for one in embeds)
    return [F.pad(one, (0, 0, 0, longest - one.shape[1])) for one in embeds]


def stack_prompts(encoded: Sequence[EncodedPrompt]) -> tuple[Tensor, Tensor]:
    """Return prompt_embeds [B, T, D] and pooled [B, P] of B prompts; zeros follow shorter ones."""
    return pad_sequence([one.embeds for one in encoded], batch_first=True), torch.stack(
        [one.pooled for one in encoded]
    )


def plain_arguments(
    prompts: Sequence[EncodedPrompt], negatives: Sequence[EncodedPrompt]
) -> dict[str, Any]:
    """Return the arguments of a pipeline that takes embeddings alone."""
    return {
        "prompt_embeds": stack_prompts(prompts)[0],
        "negative_prompt_embeds": stack_prompts(negatives)[0],
    }


def pooled_arguments(
    prompts: Sequence[EncodedPrompt], negatives: Sequence[EncodedPrompt]
) -> dict[str, Any]:
    """Return the arguments of a pipeline that takes pooled prompts beside embeddings."""
    embeds, pooled = stack_prompts(prompts)
    negative_embeds, negative_pooled = stack_prompts(negatives)
    return {
        "prompt_embeds": embeds,
        "pooled_prompt_embeds": pooled,
        "negative_prompt_embeds": negative_embeds,
        "negative_pooled_prompt_embeds": negative_pooled,
    }
