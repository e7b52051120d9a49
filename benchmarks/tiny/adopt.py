"""Begin with the weights of an embedded model that is there already.

Tokenizers differ, so rows of the text encoders' tables follow their tokens; a token that the other
model does not know keeps its random start."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTokenizer, T5TokenizerFast

from benchmarks.tiny.pipeline import TextToVelocity

TABLES = ("token_embedding.weight", "shared.weight", "encoder.embed_tokens.weight")


def adopt_(model: TextToVelocity, folder: Path) -> None:
    """Copy the transformer and text encoders of the pipeline in `folder`, of the same shape."""
    clip = _rows(model.clip_tokenizer, CLIPTokenizer.from_pretrained(folder / "tokenizer"))
    t5 = _rows(model.t5_tokenizer, T5TokenizerFast.from_pretrained(folder / "tokenizer_3"))
    _copy_(model.transformer, folder / "transformer", None)
    _copy_(model.text_encoder, folder / "text_encoder", clip)
    _copy_(model.text_encoder_2, folder / "text_encoder_2", clip)
    _copy_(model.text_encoder_3, folder / "text_encoder_3", t5)
    print(f"began with {folder.name}: {len(clip[0])} of {len(model.clip_tokenizer)} CLIP tokens")


def _rows(ours: Any, theirs: Any) -> tuple[list[int], list[int]]:
    """Ids of the shared tokens here and there."""
    known = theirs.get_vocab()
    shared = [token for token in ours.get_vocab() if token in known]
    return [ours.get_vocab()[token] for token in shared], [known[token] for token in shared]


@torch.no_grad()
def _copy_(module: torch.nn.Module, folder: Path, rows: tuple[list[int], list[int]] | None) -> None:
    stored: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        stored |= load_file(file)
    own = module.state_dict()
    for name, tensor in stored.items():
        if rows is not None and name.endswith(TABLES):
            own[name][rows[0]] = tensor[rows[1]].float()
        else:
            own[name].copy_(tensor)
