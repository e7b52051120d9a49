"""Encode each prompt once, and cache the results on disk.

Training needs the denoiser alone. Text encoders are loaded, used and freed before it starts: other
trainers run out of memory when they load them again in the middle of a run.
"""

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qzo_diffusion.diffusion import text_encoders
from qzo_diffusion.diffusion.cache import TensorCache
from qzo_diffusion.diffusion.encoded_prompt import EncodedPrompt
from qzo_diffusion.diffusion.families.family import Family
from qzo_diffusion.diffusion.model_folder import fingerprint_of_files, read_index
from qzo_diffusion.diffusion.text_encoders import load_text_encoder, load_tokenizer
from qzo_diffusion.quant.config_file import read_config
from qzo_diffusion.system.progress import Progress


class PromptEncoder:
    """Encode prompts as a family's pipeline does.

    Encoders are loaded only for missing prompts, one after the other.

    Args:
        t5_tokens: the most tokens of T5 or of a language model; None is the tokenizer's own
            limit, at most the pipeline's.
        t5: names the way in which it is loaded, for the cache key. "none" leaves it out, and the
            prompt has zeros in its place.
        load: loads the encoder of a part; by default as it is on disk.
    """

    def __init__(
        self,
        folder: Path,
        cache: TensorCache,
        *,
        family: Family,
        device: torch.device,
        dtype: torch.dtype,
        t5_tokens: int | None = None,
        t5: str = "full",
        load: Callable[[str], Any] | None = None,
    ) -> None:
        self._folder, self._cache, self._family = folder, cache, family
        self.dtype, self.t5_tokens = dtype, t5_tokens
        part = family.texts.large
        self.t5 = t5 if part is not None and text_encoders.has_part(folder, part) else "none"
        self._load = load or (
            lambda part: load_text_encoder(
                folder, part, family.texts.classes[part], dtype=dtype, device=device
            )
        )
        self._identity = fingerprint_of_files(folder, family.texts.parts())
        self._bar: Progress | None = None

    def encode(self, prompts: Iterable[str]) -> dict[str, EncodedPrompt]:
        wanted = list(dict.fromkeys(prompts))
        found = {prompt: self._cache.get(self._key(prompt)) for prompt in wanted}
        missing = [prompt for prompt in wanted if found[prompt] is None]
        if missing:
            for prompt, tensors in zip(missing, self._run_encoders(missing), strict=True):
                self._cache.put(self._key(prompt), tensors)
                found[prompt] = tensors
        return {
            prompt: _encoded(tensors) for prompt, tensors in found.items() if tensors is not None
        }

    def _key(self, prompt: str) -> dict[str, str | int | float | bool]:
        length = self.t5_tokens or 0
        key: dict[str, str | int | float | bool]
        key = {
            "prompt": prompt,
            "encoders": self._identity,
            "t5_tokens": length,
            "dtype": str(self.dtype),
            "format": 2,
            "family": self._family.name,
        }
        return key if self.t5 == "full" else key | {"t5": self.t5}

    def _run_encoders(self, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        """Encode all prompts by each encoder in turn."""
        count = len(self._family.texts.classes)
        with Progress(total=count, desc="encode prompts", unit="encoder", leave=False) as self._bar:
            found = self._family.texts.encode(self, prompts)
        return [{name: self._cast(tensor) for name, tensor in one.items()} for one in found]

    def _cast(self, tensor: Tensor) -> Tensor:
        """To the denoiser's dtype, which an encoder may not run in; counts of tokens stay."""
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def tokenizer(self, part: str) -> Any:
        return load_tokenizer(self._folder, part)

    def run(self, part: str, work: Callable[[Any, Any], Any]) -> Any:
        tokenizer, encoder = self.tokenizer(part), self._load(part)
        try:
            return work(encoder, tokenizer)
        finally:
            del encoder
            gc.collect()
            if self._bar is not None:
                self._bar.update()

    def setting(self, name: str, default: Any) -> Any:
        return read_index(self._folder).get(name, default)

    def width(self, places: Sequence[tuple[str, str]], default: int) -> int:
        for part, name in places:
            file = self._folder / part / "config.json"
            if file.is_file():
                return int(read_config(file).get(name, default))
        return default


def _encoded(tensors: Mapping[str, Tensor]) -> EncodedPrompt:
    tokens, limit = (int(value) for value in tensors["tokens"])
    return EncodedPrompt(tensors["embeds"], tensors["pooled"], tokens, tokens > limit)
