"""The examples of a run on rewards: prompts with the noise that their pictures begin with."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qzo_diffusion.diffusion.encoded_prompt import EncodedPrompt, stack_prompts


@dataclass(frozen=True)
class PictureBatch:
    """Everything that the pictures of some examples depend on, besides the model.

    noise [B, C, h, w] fp32; embeds [B, T, D] and pooled [B, P] of the prompts, negative_embeds and
    negative_pooled of the negative prompts. texts: the prompts as a person wrote them.
    """

    noise: Tensor
    embeds: Tensor
    pooled: Tensor
    negative_embeds: Tensor
    negative_pooled: Tensor
    texts: tuple[str, ...]

    @classmethod
    def of(
        cls,
        noise: Tensor,
        texts: Sequence[str],
        prompts: Sequence[EncodedPrompt],
        negatives: Sequence[EncodedPrompt],
    ) -> "PictureBatch":
        """Return the batch of encoded prompts, one for each noise."""
        return cls(noise, *stack_prompts(prompts), *stack_prompts(negatives), tuple(texts))

    def __len__(self) -> int:
        return len(self.texts)

    def part(self, examples: slice) -> "PictureBatch":
        """Return some of the examples."""
        return _made((one[examples] for one in self._tensors()), self.texts[examples])

    def repeated(self, times: int) -> "PictureBatch":
        """Return all examples `times` times: all of them, then all of them again."""
        tensors = (torch.cat([one] * times) for one in self._tensors())
        return _made(tensors, self.texts * times)

    def split(self, size: int) -> list["PictureBatch"]:
        """Return micro-batches of at most `size` examples."""
        return [self.part(slice(start, start + size)) for start in range(0, len(self.texts), size)]

    def to(self, device: torch.device) -> "PictureBatch":
        return _made((one.to(device) for one in self._tensors()), self.texts)

    def _tensors(self) -> tuple[Tensor, ...]:
        return (
            self.noise,
            self.embeds,
            self.pooled,
            self.negative_embeds,
            self.negative_pooled,
        )


def _made(tensors: Iterable[Tensor], texts: tuple[str, ...]) -> PictureBatch:
    noise, embeds, pooled, negative_embeds, negative_pooled = tensors
    return PictureBatch(noise, embeds, pooled, negative_embeds, negative_pooled, texts)
