"""Load the parts of a Stable Diffusion 3 pipeline one after the other, encode with them once, and
free them.

Training needs the transformer alone. Text encoders and the VAE's encoder are loaded, used and freed
before it starts: other trainers run out of memory when they load them again in the middle of a run.
"""

import gc
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.diffusion import text_encoders
from qzo_diffusion.diffusion.cache import TensorCache
from qzo_diffusion.diffusion.text_encoders import (
    CLIP_G,
    CLIP_L,
    T5,
    clip_states,
    load_text_encoder,
    load_tokenizer,
    put_together,
    t5_states,
)
from qzo_diffusion.diffusion.vae import read_vae_config, reduction
from qzo_diffusion.quant.config_file import read_config
from qzo_diffusion.quant.describe import SUPPORTED, family_of_class
from qzo_diffusion.quant.json_file import read_object

TEXT_PARTS = (
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "tokenizer",
    "tokenizer_2",
    "tokenizer_3",
)
WEIGHT_PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
PIPELINE_T5_TOKENS = 256
# Token-wise layers: they change mostly the loss of their own patch. Keys and values do not.
TOKEN_WISE_LAYERS = ("attn.to_q", "attn.to_out", "attn2.to_q", "attn2.to_out", "ff.net")
SCHEDULER = "FlowMatchEulerDiscreteScheduler"
SAMPLE_SIZE = 128  # side in latents, of all models of the SD3 family
# bytes; larger files are identified by size, time and their first part
HASHED_IN_FULL = 256 * 2**20


@dataclass(frozen=True)
class EncodedPrompt:
    """An encoded prompt: embeds [T, D] (CLIP tokens, then T5 tokens), and pooled [P].

    tokens: the longest count over the tokenizers.
    """

    embeds: Tensor
    pooled: Tensor
    tokens: int
    truncated: bool


PIPELINE = (
    "a diffusers folder of a Stable Diffusion 3 pipeline (model_index.json, transformer/, ...)"
)
NEEDED = (
    "transformer",
    "vae",
    "scheduler",
    "text_encoder",
    "text_encoder_2",
    "tokenizer",
    "tokenizer_2",
)


def check_model_folder(folder: Path, without: Sequence[str] = ()) -> None:
    """Check that a folder is a whole SD3 pipeline in safetensors, before anything is loaded.

    Args:
        without: parts that come from elsewhere, or that a run leaves out.

    Raises:
        ModelError: a part is missing or holds pickles only; the message names it.
    """
    parts = _parts_of(folder)
    for part in NEEDED:
        if part not in without and (part not in parts or not (folder / part).is_dir()):
            raise ModelError(
                f"{folder} lacks the part {part}/",
                PIPELINE,
                "download the model again, with all its parts",
            )
    for part in WEIGHT_PARTS:
        if part not in without and part in parts and not any((folder / part).glob("*.safetensors")):
            raise _without_weights(folder, part)


def _parts_of(folder: Path) -> set[str]:
    """Return the parts that model_index.json names. Raises ModelError."""
    file = folder / "model_index.json"
    if not file.is_file():
        kind = _kind_of_folder(folder)
        raise ModelError(
            f"{folder} is {kind}" if kind else f"{folder} has no model_index.json",
            PIPELINE,
            "give --model a pipeline folder, a Hub id, or tiny"
            + ("; a transformer alone goes to transformer=PATH" if kind else ""),
        )
    index = read_object(file, PIPELINE)
    pipeline = str(index.get("_class_name", "StableDiffusion3Pipeline"))
    if not pipeline.startswith("StableDiffusion3"):
        raise ModelError(
            f"{folder} is a pipeline of {family_of_class(pipeline)} ({pipeline})",
            SUPPORTED,
            "give --model one of these",
        )
    return {name for name, kind in index.items() if isinstance(kind, list) and any(kind[:1])}


def _kind_of_folder(folder: Path) -> str | None:
    """Describe a folder that is not a pipeline."""
    if (folder / "adapter_config.json").is_file():
        return "a LoRA, as peft saves it"
    if not (folder / "config.json").is_file():
        return None
    config = read_object(folder / "config.json", PIPELINE)
    if "_class_name" in config:
        return f"one part of a pipeline ({config['_class_name']})"
    if "model_type" in config:
        return f"a model of transformers ({config['model_type']}), for `qzo-diffuse llm`"
    return None


def _without_weights(folder: Path, part: str) -> ModelError:
    files = sorted((folder / part).glob("*"))
    pickles = [file.name for file in files if file.suffix.lower() in PICKLES]
    remedy = "get the safetensors version; pickles can run code and are not read"
    if not pickles:
        remedy = "download the model again, with all its parts"
    if part == T5:
        remedy += "; or leave T5 out: text.t5=none"
    return ModelError(
        f"{part}/ holds pickles only ({pickles[0]})" if pickles else f"{part}/ holds no weights",
        f"{part}/*.safetensors",
        remedy,
    )


def fingerprint_of_files(folder: Path, parts: Iterable[str]) -> str:
    """Identify the files of some parts of a model, for cache keys: by their bytes up to 256 MiB."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(
        file for part in parts for file in (folder / part).glob("*") if file.is_file()
    ):
        status = file.stat()
        digest.update(f"{file.parent.name}/{file.name}:{status.st_size}".encode())
        with file.open("rb") as handle:
            if status.st_size > HASHED_IN_FULL:
                digest.update(str(status.st_mtime_ns).encode())
            digest.update(
                handle.read(HASHED_IN_FULL if status.st_size <= HASHED_IN_FULL else 2**20)
            )
    return digest.hexdigest()


class PromptEncoder:
    """Encode each prompt once, and cache the results on disk.

    Encoders are loaded only for missing prompts, one after the other.

    Args:
        t5_tokens: the most T5 tokens; None is the tokenizer's own limit, at most the pipeline's
            256.
        t5: names the way in which T5 is loaded, for the cache key. "none" leaves it out, and the
            prompt has zeros in its place.
        load: loads the encoder of a part; by default as it is on disk.
    """

    def __init__(
        self,
        folder: Path,
        cache: TensorCache,
        *,
        device: torch.device,
        dtype: torch.dtype,
        t5_tokens: int | None = None,
        t5: str = "full",
        load: Callable[[str], Any] | None = None,
    ) -> None:
        self._folder, self._cache, self._dtype, self._t5_tokens = folder, cache, dtype, t5_tokens
        self._t5 = t5 if text_encoders.has_part(folder, T5) else "none"
        self._load = load or (
            lambda part: load_text_encoder(folder, part, dtype=dtype, device=device)
        )
        self._identity = fingerprint_of_files(folder, TEXT_PARTS)

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
        length = self._t5_tokens or 0
        key: dict[str, str | int | float | bool]
        key = {
            "prompt": prompt,
            "encoders": self._identity,
            "t5_tokens": length,
            "dtype": str(self._dtype),
            "format": 2,
        }
        return key if self._t5 == "full" else key | {"t5": self._t5}

    def _run_encoders(self, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        """Encode all prompts by each encoder in turn."""
        with tqdm(total=3 * len(prompts), desc="encode prompts", leave=False) as bar:
            clips = []
            for part in (CLIP_L, CLIP_G):
                clips.append(
                    self._with(
                        part, lambda encoder, tokenizer: clip_states(encoder, tokenizer, prompts)
                    )
                )
                bar.update(len(prompts))
            if self._t5 == "none":
                length = self._t5_tokens or PIPELINE_T5_TOKENS
                zeros = torch.zeros(length, text_encoders.t5_width(self._folder), dtype=self._dtype)
                t5, t5_tokenizer = [zeros] * len(prompts), None
            else:
                t5_tokenizer = load_tokenizer(self._folder, T5)
                length = self._t5_tokens or min(PIPELINE_T5_TOKENS, t5_tokenizer.model_max_length)
                t5 = self._with(
                    T5, lambda encoder, tokenizer: t5_states(encoder, tokenizer, prompts, length)
                )
            bar.update(len(prompts))
        clip_tokenizer = load_tokenizer(self._folder, CLIP_L)
        limits = [(clip_tokenizer, clip_tokenizer.model_max_length)] + (
            [(t5_tokenizer, length)] if t5_tokenizer else []
        )
        return [
            {
                "embeds": put_together(clip_l[0], clip_g[0], t5_state),
                "pooled": torch.cat([clip_l[1], clip_g[1]]),
                "tokens": torch.tensor(_longest(prompt, limits)),
            }
            for prompt, clip_l, clip_g, t5_state in zip(prompts, *clips, t5, strict=True)
        ]

    def _with(self, part: str, work: Callable[[Any, Any], Any]) -> Any:
        tokenizer, encoder = load_tokenizer(self._folder, part), self._load(part)
        try:
            return work(encoder, tokenizer)
        finally:
            del encoder
            gc.collect()


def _longest(prompt: str, limits: Sequence[tuple[Any, int]]) -> tuple[int, int]:
    """Return (tokens, limit) of the tokenizer that is nearest to its limit, or most above it."""
    counts = [
        (len(tokenizer(prompt, verbose=False).input_ids), limit) for tokenizer, limit in limits
    ]
    return max(counts, key=lambda pair: pair[0] / pair[1])


def _encoded(tensors: Mapping[str, Tensor]) -> EncodedPrompt:
    tokens, limit = (int(value) for value in tensors["tokens"])
    return EncodedPrompt(tensors["embeds"], tensors["pooled"], tokens, tokens > limit)


def load_scheduler(folder: Path) -> Any:
    """Load the scheduler of a pipeline folder.

    Raises:
        ModelError: its config is damaged, or belongs to another scheduler.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    file = folder / "scheduler" / "scheduler_config.json"
    config = read_object(file, "the config of a scheduler")
    kind = config.get("_class_name", SCHEDULER)
    try:
        if kind != SCHEDULER:
            raise ValueError(f"it is of {kind}")
        return FlowMatchEulerDiscreteScheduler.from_config(config)
    except Exception as error:  # a wrong value may raise anything in diffusers
        raise ModelError(
            f"{file} is refused: {error}",
            f"the scheduler of Stable Diffusion 3: {SCHEDULER}",
            "put the scheduler/ of a Stable Diffusion 3 model there",
        ) from None


def native_resolution(folder: Path) -> int:
    """Return the side in pixels that the model was trained at: the transformer's sample size times
    the VAE's reduction.

    Raises:
        ModelError: a config is damaged.
    """
    config = folder / "transformer" / "config.json"
    # a single file has no such setting
    transformer = read_config(config) if config.is_file() else {}
    size = transformer.get("sample_size", SAMPLE_SIZE)
    return int(size) * reduction(read_vae_config(folder / "vae" / "config.json"))


def stack_prompts(encoded: Sequence[EncodedPrompt]) -> tuple[Tensor, Tensor]:
    """Return prompt_embeds [B, T, D] and pooled [B, P] of B prompts."""
    return torch.stack([one.embeds for one in encoded]), torch.stack(
        [one.pooled for one in encoded]
    )
