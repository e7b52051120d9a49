"""A Llama of two narrow blocks with a byte-pair tokenizer, saved as a folder, and small data for
it.
"""

from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qzo_diffusion.llm.causal_lm import CausalLm

# The words that tests need as single tokens, often enough to be merged; anything else falls apart
# into bytes.
WORDS = [
    " great",
    " terrible",
    " It was",
    " film",
    " good",
    " bad",
    " answer",
    "Yes",
    "No",
    "Maybe",
    " red",
    " green",
]


def tokenizer() -> PreTrainedTokenizerFast:
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        WORDS * 20, vocab_size=400, min_frequency=2, special_tokens=["<end>"], show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, eos_token="<end>", pad_token="<end>"
    )


def tiny_llama(seed: int = 0, context: int = 128, layers: int = 2) -> CausalLm:
    """Random weights with a spread that makes its opinions differ from text to text."""
    words = tokenizer()
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.dim() == 2:
            spread = 0.3 if "embed" in name else 2 / parameter.shape[1] ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return CausalLm(model, words)


def save_tiny_llama(folder: Path, seed: int = 0, context: int = 128) -> Path:
    lm = tiny_llama(seed, context)
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder


def write_sentences(folder: Path, train: int = 24, test: int = 12) -> Path:
    """SST-2's two files, without a line of names: good films are labelled 1, bad ones 0, with
    sentences of several lengths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train.tsv", train), ("dev.tsv", test)):
        lines = [
            f"a{' film' * (1 + index % 5)}{' good' if index % 2 else ' bad'} "
            f"{name[0]}{index}\t{index % 2}"
            for index in range(count)
        ]
        (folder / name).write_text("\n".join(lines) + "\n")
    return folder
