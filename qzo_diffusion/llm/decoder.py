"""The parts of a decoder like Llama that a map of its inputs can be merged into."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from qzo_diffusion.core.errors import ModelError

# Norms without a mean or a bias, and nothing between the residual stream and these layers.
KNOWN = ("llama", "mistral", "qwen2", "qwen3")
EMBEDDING, LAST_NORM, HEAD = "model.embed_tokens", "model.norm", "lm_head"
INTO_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
INTO_MLP = ("mlp.gate_proj", "mlp.up_proj")
VALUES, OUT_OF_ATTENTION, OUT_OF_MLP = "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"
NORMS = {"input_layernorm": INTO_ATTENTION, "post_attention_layernorm": INTO_MLP}


@dataclass(frozen=True)
class Decoder:
    """Sizes of a decoder.

    width: of the residual stream. inner: of the feed-forward. head: of a head of attention. tied:
    embedding and output head share their weight.
    """

    blocks: int
    width: int
    inner: int
    head: int
    query_heads: int
    value_heads: int
    tied: bool

    def names(self) -> Iterable[str]:
        """The blocks' names, as transformers has them."""
        return (f"model.layers.{index}" for index in range(self.blocks))


def decoder_of(model: Any, tied: bool) -> Decoder:
    """Return the sizes of a model of transformers, from its config.

    Raises:
        ModelError: it is no decoder of a known kind.
    """
    config: Any = model.config
    if config.model_type not in KNOWN:
        raise ModelError(
            f"quant.transform for a model of the kind {config.model_type}",
            f"one of the kinds {', '.join(KNOWN)}, whose norms a rotation passes through",
            "use quant.transform=none",
        )
    heads = config.num_attention_heads
    return Decoder(
        blocks=config.num_hidden_layers,
        width=config.hidden_size,
        inner=config.intermediate_size,
        head=getattr(config, "head_dim", None) or config.hidden_size // heads,
        query_heads=heads,
        value_heads=config.num_key_value_heads,
        tied=tied,
    )
