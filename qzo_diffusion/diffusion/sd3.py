"""Load the parts of a Stable Diffusion 3 pipeline one after the other, encode with them once, and free them.

Training needs the transformer alone. Text encoders and the VAE's encoder are loaded, used and dropped before it starts, because
bringing them back in mid-run is where other trainers run out of memory.
"""

import gc
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.diffusion.cache import TensorCache

TEXT_PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
WEIGHT_PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
PIPELINE_T5_TOKENS = 256
# Layers that treat the patches of a picture apart: what they do to a patch shows in its own loss. Keys and values do not.
POINTWISE_LAYERS = ("attn.to_q", "attn.to_out", "attn2.to_q", "attn2.to_out", "ff.net")
SAMPLE_SIZE = 128  # of latents, all models of the SD3 family
HASHED_IN_FULL = 256 * 2**20  # bytes; larger files are told apart by size, time and their first part


@dataclass(frozen=True)
class EncodedPrompt:
    """embeds [T, D] (CLIP tokens, then T5 tokens), pooled [P]; tokens is the longest count over the tokenizers."""

    embeds: Tensor
    pooled: Tensor
    tokens: int
    truncated: bool


def check_model_folder(folder: Path, without: Sequence[str] = ()) -> None:
    """Refuse a folder that is not a whole SD3 pipeline in safetensors, before anything is loaded.

    Args:
        without: parts that come from elsewhere.

    Raises:
        ModelError: names the part that is missing or holds pickles only.
    """
    expected = "a diffusers folder of a Stable Diffusion 3 pipeline (model_index.json, transformer/, vae/, ...)"
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise ModelError(f"{folder} has no model_index.json", expected, "give --model a pipeline folder, a Hub id, or tiny")
    try:
        index = json.loads(index_file.read_text())
        parts = {name: kind for name, kind in index.items() if isinstance(kind, list) and kind[0]}
    except (ValueError, AttributeError, IndexError) as error:
        raise ModelError(f"{index_file} is damaged: {error}", expected, "download the model again") from None
    for part in ("transformer", "vae", "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        if part in without:
            continue
        if part not in parts or not (folder / part).is_dir():
            raise ModelError(f"{folder} lacks the part {part}/", expected, "download the model again, with all its parts")
    for part in WEIGHT_PARTS:
        if part not in without and part in parts and not any((folder / part).glob("*.safetensors")):
            pickles = [file.name for file in (folder / part).glob("*") if file.suffix in PICKLES]
            got = f"{part}/ holds pickles only ({pickles[0]})" if pickles else f"{part}/ holds no weights"
            raise ModelError(got, f"{part}/*.safetensors", "get the safetensors version; pickles can run code and are not read")


def fingerprint_of_files(folder: Path, parts: Iterable[str]) -> str:
    """Identifies the files of some parts of a model, for cache keys: by their bytes up to 256 MiB."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(file for part in parts for file in (folder / part).glob("*") if file.is_file()):
        status = file.stat()
        digest.update(f"{file.parent.name}/{file.name}:{status.st_size}".encode())
        with file.open("rb") as handle:
            if status.st_size > HASHED_IN_FULL:
                digest.update(str(status.st_mtime_ns).encode())
            digest.update(handle.read(HASHED_IN_FULL if status.st_size <= HASHED_IN_FULL else 2**20))
    return digest.hexdigest()


class PromptEncoder:
    """Encodes each prompt once; results are cached on disk. The encoders are loaded on the first miss and freed by `close`."""

    def __init__(
        self, folder: Path, cache: TensorCache, *, device: torch.device, dtype: torch.dtype, t5_tokens: int | None = None
    ) -> None:
        self._folder, self._cache, self._device, self._dtype = folder, cache, device, dtype
        self._t5_tokens = t5_tokens
        self._identity = fingerprint_of_files(folder, TEXT_PARTS)
        self._pipeline: Any = None

    def encode(self, prompts: Iterable[str]) -> dict[str, EncodedPrompt]:
        return {prompt: self._encode_one(prompt) for prompt in dict.fromkeys(prompts)}

    def close(self) -> None:
        self._pipeline = None
        gc.collect()

    def _key(self, prompt: str) -> dict[str, str | int | float | bool]:
        length = self._t5_tokens or 0
        return {"prompt": prompt, "encoders": self._identity, "t5_tokens": length, "dtype": str(self._dtype), "format": 1}

    def _encode_one(self, prompt: str) -> EncodedPrompt:
        stored = self._cache.get(self._key(prompt))
        if stored is None:
            stored = self._run_encoders(prompt)
            self._cache.put(self._key(prompt), stored)
        tokens, limit = (int(value) for value in stored["tokens"])
        return EncodedPrompt(stored["embeds"], stored["pooled"], tokens, tokens > limit)

    @torch.no_grad()
    def _run_encoders(self, prompt: str) -> dict[str, Tensor]:
        pipeline = self._loaded()
        length = self._t5_tokens or min(PIPELINE_T5_TOKENS, pipeline.tokenizer_3.model_max_length)
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompt, None, None, device=self._device, do_classifier_free_guidance=False, max_sequence_length=length
        )
        tokenizers = ((pipeline.tokenizer, pipeline.tokenizer.model_max_length), (pipeline.tokenizer_3, length))
        counts = [(len(t(prompt, verbose=False).input_ids), limit) for t, limit in tokenizers]
        tokens, limit = max(counts, key=lambda pair: pair[0] / pair[1])
        return {"embeds": embeds[0].cpu(), "pooled": pooled[0].cpu(), "tokens": torch.tensor([tokens, limit])}

    def _loaded(self) -> Any:
        if self._pipeline is None:
            from diffusers import StableDiffusion3Pipeline
            from diffusers.utils import logging

            logging.get_logger("diffusers.pipelines.stable_diffusion_3").setLevel(logging.ERROR)  # truncation: we count
            self._pipeline = _quietly(
                StableDiffusion3Pipeline.from_pretrained,
                self._folder,
                transformer=None,
                vae=None,
                dtype=self._dtype,
                use_safetensors=True,
                local_files_only=True,
            ).to(self._device)
        return self._pipeline


def load_vae(folder: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", dtype=dtype, use_safetensors=True, local_files_only=True)
    return vae.to(device).eval()


def load_scheduler(folder: Path) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler", local_files_only=True)


def image_encoder(vae: Any) -> Callable[[Tensor], Tensor]:
    """images [B, 3, H, W] in [-1, 1] -> latents [B, C, h, w] fp32, `(z - shift_factor) · scaling_factor` of the mean z."""

    @torch.no_grad()
    def encode(images: Tensor) -> Tensor:
        z = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mean
        return ((z - vae.config.shift_factor) * vae.config.scaling_factor).float().cpu()

    return encode


def drop_encoder_(vae: Any) -> None:
    """Free the half of the VAE that training and sampling never need again."""
    vae.encoder = None
    gc.collect()


def native_resolution(folder: Path) -> int:
    """The side in pixels that the model was trained at: the transformer's sample size times the VAE's reduction."""
    config = folder / "transformer" / "config.json"
    transformer = json.loads(config.read_text()) if config.is_file() else {}  # a single file says nothing of it
    vae = json.loads((folder / "vae" / "config.json").read_text())
    return int(transformer.get("sample_size", SAMPLE_SIZE)) * 2 ** (len(vae["block_out_channels"]) - 1)


def stack_prompts(encoded: Sequence[EncodedPrompt]) -> tuple[Tensor, Tensor]:
    """-> prompt_embeds [B, T, D], pooled [B, P]."""
    return torch.stack([one.embeds for one in encoded]), torch.stack([one.pooled for one in encoded])


def _quietly(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Without the libraries' own progress bars over six small parts."""
    import diffusers.utils.logging
    import transformers.utils.logging

    loggers = (diffusers.utils.logging, transformers.utils.logging)
    for logging in loggers:
        logging.disable_progress_bar()
    try:
        return function(*args, **options)
    finally:
        for logging in loggers:
            logging.enable_progress_bar()
