"""The prompts of T5, which several families read."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from qzo_diffusion.diffusion.families.family import Encoders, large_tokenizer
from qzo_diffusion.diffusion.text_encoders import t5_states


def encode_t5(
    encoders: Encoders, part: str, prompts: Sequence[str], most: int
) -> tuple[list[Tensor], tuple[Any, int]]:
    """Return the states [T, D] of each prompt, and T5's tokenizer with its limit T.

    Args:
        most: tokens that the family's own pipeline reads.
    """
    tokenizer, length = large_tokenizer(encoders, part, most)
    states = encoders.run(part, lambda encoder, own: t5_states(encoder, own, prompts, length))
    return states, (tokenizer, length)
