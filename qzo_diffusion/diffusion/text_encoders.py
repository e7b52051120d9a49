"""Load text encoders, each alone, and free it before the next: T5-XXL and language models are
larger than many transformers in 4 bits.

Hidden states are exactly those of diffusers' pipelines.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.diffusion.language_model import LanguageModel, PromptReader, embedding_of
from qzo_diffusion.quant.config_file import read_config
from qzo_diffusion.quant.entries import Entry
from qzo_diffusion.quant.stream import Quantization, fill_
from qzo_diffusion.quant.weights import read_entries
from qzo_diffusion.quant.without_weights import without_weights
from qzo_diffusion.system.heap import give_back

T5 = "T5EncoderModel"


EncoderKind = str | LanguageModel  # a class in transformers that is run as a whole, or a part


def dtype_of(kind: EncoderKind, dtype: torch.dtype) -> torch.dtype:
    """The dtype that an encoder runs in where the denoiser runs in `dtype`: feed-forward layers of
    T5 and of language models reach beyond the largest float16, 65504.
    """
    is_large = kind == T5 or isinstance(kind, LanguageModel)
    return torch.float32 if is_large and dtype == torch.float16 else dtype


def has_part(folder: Path, part: str) -> bool:
    return (folder / part).is_dir()


def read_encoder_entries(folder: Path, part: str, kind: EncoderKind) -> Mapping[str, Entry]:
    """Return the tensors on disk that an encoder loads. Raises ModelError."""
    entries = read_entries(folder / part)
    if isinstance(kind, str):
        return entries
    config = read_config(folder / part / "config.json", len(entries))
    embedding_of(config, entries, str(folder / part))
    return kind.used(config, entries)


def empty_text_encoder(folder: Path, part: str, kind: EncoderKind) -> nn.Module:
    """Build the encoder of a folder without memory for its weights. Raises ModelError."""
    file = folder / part / "config.json"
    config = read_config(file)
    encoder = empty_encoder(kind, config, str(file))
    if isinstance(encoder, PromptReader):
        encoder.embedding = embedding_of(config, read_entries(file.parent), str(file.parent))
    return encoder


def empty_encoder(
    kind: EncoderKind, config: Mapping[str, Any], place: str = "a config"
) -> nn.Module:
    """Build an encoder without memory for its weights; that of a language model has no embedding.

    Args:
        place: names the config in an error.

    Raises:
        ModelError: transformers refuses the config.
    """
    if isinstance(kind, str):
        return _of_class(kind, config, place)
    states = kind.read_states(config)
    decoder = _of_class(kind.class_name, kind.settings(config), place)
    return PromptReader(decoder, states, kind.has_norm(config))


def _of_class(class_name: str, config: Mapping[str, Any], place: str) -> nn.Module:
    import transformers

    settings = {name: value for name, value in config.items() if name != "quantization_config"}
    model = getattr(transformers, class_name)
    with without_weights():
        try:
            encoder: nn.Module = model(model.config_class(**settings)).eval()
            return encoder
        except Exception as error:  # a wrong value may raise anything in transformers
            raise ModelError(
                f"{place} is refused by transformers: {error}",
                f"the config of a text encoder, a {class_name}",
                "download the model again",
            ) from None


def load_text_encoder(
    folder: Path,
    part: str,
    kind: EncoderKind,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization | None = None,
) -> nn.Module:
    """Load one encoder to `device`, tensor by tensor from disk. Raises ModelError."""
    encoder = empty_text_encoder(folder, part, kind)
    entries = read_encoder_entries(folder, part, kind)
    fill_(encoder, entries, quantization, dtype=dtype, device=device)
    give_back()  # else what reading freed counts beside the first prompt's own memory
    return ready(encoder)


def ready(encoder: nn.Module) -> nn.Module:
    """Make T5 accept a quantized `wo`, by showing its packed codes as int8, the same bytes.

    T5 casts the input of `wo` to that layer's dtype unless it is int8.
    """
    for name, module in encoder.named_modules():
        if name.endswith(".wo") and type(module).__name__ == "Linear4bit":
            module.weight.data = module.weight.data.view(torch.int8)
    return encoder


VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",))


def load_tokenizer(folder: Path, part: str) -> Any:
    """Load the tokenizer of a part.

    Raises:
        ModelError: files are missing or damaged.
    """
    from transformers import AutoTokenizer

    place = folder / part.replace("text_encoder", "tokenizer")
    try:
        # without one transformers makes a tokenizer without words
        if not any(all((place / name).is_file() for name in names) for names in VOCABULARIES):
            raise ValueError(f"{place} has no {VOCABULARIES[0][0]}")
        return AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raise Exception itself for a damaged file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"the tokenizer of {part} can't be loaded: {reason}",
            "a whole model",
            "download it again",
        ) from None


def _ids(encoder: Any, tokenizer: Any, prompt: str, length: int) -> Tensor:
    """Return the tokens [1, length] of a prompt, padded and cut."""
    options = {"padding": "max_length", "max_length": length, "truncation": True}
    ids: Tensor = tokenizer(prompt, return_tensors="pt", **options).input_ids
    return ids.to(encoder.device)


@torch.no_grad()
def clip_states(
    encoder: Any, tokenizer: Any, prompts: Sequence[str]
) -> list[tuple[Tensor, Tensor]]:
    """Return, for each prompt, the last but one hidden state [77, D] and the pooled projection [D],
    on the CPU.
    """
    states = []
    for prompt in prompts:
        ids = _ids(encoder, tokenizer, prompt, tokenizer.model_max_length)
        output = encoder(ids, output_hidden_states=True)
        states.append((output.hidden_states[-2][0].cpu(), output[0][0].cpu()))
    return states


@torch.no_grad()
def clip_last(encoder: Any, tokenizer: Any, prompts: Sequence[str]) -> list[Tensor]:
    """Return the last hidden state [77, D] of each prompt, on the CPU."""
    length, masked = tokenizer.model_max_length, getattr(encoder.config, "use_attention_mask", None)
    if masked:
        raise ModelError(
            "a text encoder with use_attention_mask",
            "an encoder that reads all 77 tokens",
            "use another model",
        )
    return [encoder(_ids(encoder, tokenizer, prompt, length))[0][0].cpu() for prompt in prompts]


@torch.no_grad()
def clip_pooled(encoder: Any, tokenizer: Any, prompts: Sequence[str]) -> list[Tensor]:
    """Return the pooled state [D] of each prompt, without a projection, on the CPU."""
    length = tokenizer.model_max_length
    return [
        encoder(_ids(encoder, tokenizer, prompt, length)).pooler_output[0].cpu()
        for prompt in prompts
    ]


@torch.no_grad()
def t5_states(encoder: Any, tokenizer: Any, prompts: Sequence[str], length: int) -> list[Tensor]:
    """Return [length, D] for each prompt, on the CPU."""
    return [encoder(_ids(encoder, tokenizer, prompt, length))[0][0].cpu() for prompt in prompts]


def longest(prompt: str, limits: Sequence[tuple[Any, int]]) -> Tensor:
    """Return (tokens, limit) of the tokenizer that is nearest to its limit, or most above it.

    Args:
        limits: tokenizers, and the most tokens that are read.
    """
    counts = [
        (len(tokenizer(prompt, verbose=False).input_ids), limit) for tokenizer, limit in limits
    ]
    return torch.tensor(max(counts, key=lambda pair: pair[0] / pair[1]))
