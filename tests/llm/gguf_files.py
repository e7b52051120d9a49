"""A tiny Llama in one GGUF file, as llama.cpp's converter lays it out."""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import quants
from torch import Tensor

from qzo_diffusion.llm.causal_lm import CausalLm

TENSORS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def turned(weight: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys as the converter puts them: the halves of each head become
    neighbours.
    """
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def turned_back(weight: Tensor, heads: int) -> Tensor:
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def quantized(weight: Tensor, kind: str) -> tuple[np.ndarray, Tensor]:
    """The bytes of a weight in a type, and the weight that they stand for."""
    of_kind = gguf.GGMLQuantizationType[kind]
    data = quants.quantize(weight.numpy(), of_kind)
    return data, torch.from_numpy(quants.dequantize(data, of_kind))


def write_gguf(file: Path, lm: CausalLm, kind: str = "Q4_0") -> dict[str, Tensor]:
    """The model in blocks of `kind`; returns the plain weights that its layers stand for, by
    layer.
    """
    config, plain = lm.model.config, {}
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    words = lm.tokenizer.backend_tokenizer
    vocabulary = sorted(words.get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([word for word, _ in vocabulary])
    writer.add_token_types(
        [gguf.TokenType.CONTROL if index == 0 else gguf.TokenType.NORMAL for _, index in vocabulary]
    )
    merges = json.loads(words.to_str())["model"]["merges"]
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    )
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    writer.add_pad_token_id(0)
    for name, tensor in lm.model.state_dict().items():
        layer = name.removesuffix(".weight")
        if layer == "lm_head":
            continue  # tied
        part = layer.split(".", 3)[-1] if "layers" in layer else layer
        stored = (
            f"blk.{layer.split('.')[2]}.{TENSORS[part]}" if "layers" in layer else TENSORS[part]
        )
        if "_proj" not in layer:
            writer.add_tensor(f"{stored}.weight", tensor.float().numpy())
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
            layer.split(".")[-1]
        )
        data, weight = quantized(turned(tensor, heads) if heads else tensor, kind)
        plain[layer] = turned_back(weight, heads) if heads else weight
        writer.add_tensor(f"{stored}.weight", data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return plain
