"""Load the three text encoders of SD3, each alone, and free it before the next: T5-XXL is larger
than the transformer in 4 bits.

Prompt embeddings are exactly those of diffusers' pipeline. 77 tokens of CLIP-L and OpenCLIP-G stand
side by side (the last but one hidden state), padded with zeros to T5's width. T5's tokens follow,
or zeros without T5.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.quant.config_file import read_config
from qzo_diffusion.quant.stream import Quantization, fill_
from qzo_diffusion.quant.weights import read_entries

CLIP_L, CLIP_G, T5 = "text_encoder", "text_encoder_2", "text_encoder_3"
T5_WIDTH = 4096


def has_part(folder: Path, part: str) -> bool:
    return (folder / part).is_dir()


def empty_text_encoder(folder: Path, part: str) -> nn.Module:
    """Build the encoder of a folder without memory for its weights. Raises ModelError."""
    file = folder / part / "config.json"
    return empty_encoder(part, read_config(file), str(file))


def empty_encoder(part: str, config: Mapping[str, Any], place: str = "a config") -> nn.Module:
    """Build the encoder of a part of a pipeline without memory for its weights.

    Args:
        place: names the config in an error.

    Raises:
        ModelError: transformers refuses the config.
    """
    import transformers
    from accelerate import init_empty_weights

    settings = {name: value for name, value in config.items() if name != "quantization_config"}
    try:
        # Buffers stay real: transformers computes some when it builds a model; files lack them.
        with init_empty_weights(include_buffers=False):
            if part == T5:
                return transformers.T5EncoderModel(transformers.T5Config(**settings)).eval()
            return transformers.CLIPTextModelWithProjection(
                transformers.CLIPTextConfig(**settings)
            ).eval()
    except Exception as error:  # a wrong value may raise anything in transformers
        raise ModelError(
            f"{place} is refused by transformers: {error}",
            "the text encoder of a Stable Diffusion 3 model",
            "download the model again",
        ) from None


def load_text_encoder(
    folder: Path,
    part: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization | None = None,
) -> nn.Module:
    """Load one encoder to `device`, tensor by tensor from disk. Raises ModelError."""
    encoder = empty_text_encoder(folder, part)
    fill_(encoder, read_entries(folder / part), quantization, dtype=dtype, device=device)
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


@torch.no_grad()
def clip_states(
    encoder: Any, tokenizer: Any, prompts: Sequence[str]
) -> list[tuple[Tensor, Tensor]]:
    """Return, for each prompt, the last but one hidden state [77, D] and the pooled projection [D],
    on the CPU.
    """
    states = []
    for prompt in prompts:
        options = {
            "padding": "max_length",
            "max_length": tokenizer.model_max_length,
            "truncation": True,
        }
        ids = tokenizer(prompt, return_tensors="pt", **options).input_ids
        output = encoder(ids.to(encoder.device), output_hidden_states=True)
        states.append((output.hidden_states[-2][0].cpu(), output[0][0].cpu()))
    return states


@torch.no_grad()
def t5_states(encoder: Any, tokenizer: Any, prompts: Sequence[str], length: int) -> list[Tensor]:
    """Return [length, D] for each prompt, on the CPU."""
    states = []
    for prompt in prompts:
        options = {
            "padding": "max_length",
            "max_length": length,
            "truncation": True,
            "add_special_tokens": True,
        }
        ids = tokenizer(prompt, return_tensors="pt", **options).input_ids
        states.append(encoder(ids.to(encoder.device))[0][0].cpu())
    return states


def put_together(clip_l: Tensor, clip_g: Tensor, t5: Tensor) -> Tensor:
    """Join [77, 768], [77, 1280] and [T, 4096] to prompt_embeds [77 + T, 4096]."""
    clip = torch.cat([clip_l, clip_g], dim=-1)
    return torch.cat([F.pad(clip, (0, t5.shape[-1] - clip.shape[-1])), t5])


def t5_width(folder: Path) -> int:
    """Return the width of prompt embeddings that the transformer expects, also without T5."""
    for place, name in ((folder / T5, "d_model"), (folder / "transformer", "joint_attention_dim")):
        if (place / "config.json").is_file():
            return int(read_config(place / "config.json").get(name, T5_WIDTH))
    return T5_WIDTH
