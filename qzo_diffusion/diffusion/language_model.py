"""Language models as text encoders.

Only the layers up to the last hidden state that a denoiser reads are built, loaded and run: no
vision tower, no head. The token embedding stays on disk, and prompts read their rows of it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.quant.entries import Entry

# before the names of layers: text models alone, with a head, and beside a vision tower
_LAYERS = re.compile(r"^(?:model\.)?(?:language_model\.)?(?:model\.)?(layers\.(\d+)\..+|norm\..+)$")
_EMBEDDING = "embed_tokens.weight"


@dataclass(frozen=True)
class LanguageModel:
    """A language model that encodes prompts.

    class_name: of its layers in transformers, without a head. states: the hidden states that are
    read, where 0 is the embedding; negative ones count from the last, which has the final norm.
    """

    class_name: str
    states: tuple[int, ...]

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the config of the layers that are run."""
        own = text_config(config)
        settings = dict(own) | {"num_hidden_layers": self._depth(config)}
        if isinstance(own.get("layer_types"), list):
            settings["layer_types"] = own["layer_types"][: self._depth(config)]
        return settings

    def read_states(self, config: Mapping[str, Any]) -> tuple[int, ...]:
        """Return `states` counted from the first. Raises ModelError for a model of fewer layers."""
        layers = text_config(config).get("num_hidden_layers")
        count = layers + 1 if isinstance(layers, int) else 0
        if any(not -count <= state < count for state in self.states):
            raise ModelError(
                f"a text encoder with num_hidden_layers = {layers}",
                f"at least {max(map(abs, self.states))}, whose states the denoiser reads",
                "use the parts of one model",
            )
        return tuple(state % count for state in self.states)

    def has_norm(self, config: Mapping[str, Any]) -> bool:
        """Return whether the final norm is run."""
        return self._depth(config) == text_config(config)["num_hidden_layers"]

    def used(self, config: Mapping[str, Any], entries: Mapping[str, Entry]) -> dict[str, Entry]:
        """Return the tensors that are loaded, by the names of `PromptReader`."""
        depth, norm = self._depth(config), self.has_norm(config)
        found = {name: match for name in entries if (match := _LAYERS.match(name))}
        return {
            f"decoder.{match[1]}": entries[name]
            for name, match in found.items()
            if (norm if match[2] is None else int(match[2]) < depth)
        }

    def _depth(self, config: Mapping[str, Any]) -> int:
        return max(self.read_states(config))


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a config that describes the text model."""
    own = config.get("text_config")
    return own if isinstance(own, dict) else config


class PromptReader(nn.Module):
    """The layers of a language model that are run, and the place of its token embedding.

    Args:
        decoder: the layers; its embedding and, unless `norm`, its final norm are dropped.
        states: the hidden states that are read, counted from the first.
    """

    embedding: Entry | None = None

    def __init__(self, decoder: Any, states: Sequence[int], norm: bool) -> None:
        super().__init__()
        decoder.embed_tokens = None
        if not norm:
            decoder.norm = nn.Identity()
        self.decoder, self._states = decoder, tuple(states)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the hidden states [S, T, D] of tokens [1, T]. mask: [1, T], 0 at padding."""
        first = next(self.decoder.parameters())
        embeds = self._rows(ids).to(first.device, self._dtype())
        output = self.decoder(
            inputs_embeds=embeds,
            attention_mask=None if mask is None else mask.to(first.device),
            output_hidden_states=True,
            use_cache=False,
        )
        return torch.cat([output.hidden_states[state] for state in self._states])

    def _dtype(self) -> torch.dtype:
        """The dtype of products: weights in 4 bits are bytes, and norms are not."""
        return next(one.dtype for one in self.decoder.parameters() if one.dim() == 1)

    def _rows(self, ids: Tensor) -> Tensor:
        """Return the embeddings [1, T, D] of tokens, on the CPU."""
        assert self.embedding is not None
        tokens, places = ids.cpu().unique(return_inverse=True)
        rows = [self.embedding.rows(one, one + 1).read() for one in tokens.tolist()]
        return torch.cat(rows)[places]


def embedding_of(config: Mapping[str, Any], entries: Mapping[str, Entry], place: str) -> Entry:
    """Return the token embedding on disk. Raises ModelError."""
    own = text_config(config)
    wanted = (own.get("vocab_size"), own.get("hidden_size"))
    found = next((entries[name] for name in entries if name.endswith(_EMBEDDING)), None)
    if found is None or found.shape != wanted or not found.dtype.is_floating_point:
        raise ModelError(
            f"{place} without the token embedding"
            if found is None
            else f"{place} has a token embedding {found.dtype} of the shape {found.shape}",
            f"{_EMBEDDING} in floating point of the shape {wanted}",
            "download the model again, with all its parts",
        )
    return found


def chat_text(tokenizer: Any, prompt: str, **options: Any) -> str:
    """Return a prompt as the user's turn of a chat, before the model's answer.

    Raises:
        ModelError: the tokenizer has no template of a chat.
    """
    turns = [{"role": "user", "content": prompt}]
    try:
        text: str = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, **options
        )
        return text
    except Exception as error:  # a template is a program of its own
        raise ModelError(
            f"a tokenizer whose chat template fails: {str(error).splitlines()[0]}",
            "the tokenizer of a chat model, with its template",
            "download the model again, with all its parts",
        ) from None


@torch.no_grad()
def language_states(
    encoder: PromptReader, tokenizer: Any, texts: Sequence[str], length: int, padded: bool = False
) -> list[Tensor]:
    """Return the hidden states [S, T, D] of each text, on the CPU.

    Args:
        length: the most tokens; longer texts are cut.
        padded: T is `length`, with states of padding as well.
    """
    return [encoder(*tokens).cpu() for tokens in _tokens(tokenizer, texts, length, padded)]


def _tokens(
    tokenizer: Any, texts: Sequence[str], length: int, padded: bool
) -> Iterator[tuple[Tensor, Tensor | None]]:
    padding = {"padding": "max_length"} if padded else {}
    for text in texts:
        found = tokenizer(text, max_length=length, truncation=True, return_tensors="pt", **padding)
        yield found.input_ids, found.attention_mask if padded else None
