"""Whole models that are small and random, with the same bits on every machine and with every
version of torch: a pipeline in the shape of Stable Diffusion 3.5, and a Llama.

Their weights are integers of a documented random generator, divided by a power of two. Runs that an
earlier commit made are stored in `tests/runs/old/`, so never change what is made here.
"""

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

SIDE = 32  # pixels of a picture
LENGTH = 24  # tokens of a prompt


def fill_(model: nn.Module, key: int) -> nn.Module:
    """Matrices and kernels are uniform, with a spread of about one over the root of their inputs;
    biases are zero and weights of norms one."""
    words = np.random.Philox(key=key)
    for name, parameter in sorted(model.named_parameters()):
        parameter.data.fill_(0 if name.endswith("bias") else 1)
        if parameter.dim() > 1:
            fan_in = parameter[0].numel()
            shift = (fan_in.bit_length() - 1) // 2
            drawn = words.random_raw(parameter.numel()) >> 41  # 23 bits, exact in float32
            uniform = (drawn.astype(np.float64) * 2.0**-22 - 1.0) * 2.0**-shift
            parameter.data = torch.from_numpy(uniform).float().view(parameter.shape)
    return model.eval().requires_grad_(False)


def tokenizer(length: int, begin: str, end: str):
    """One token for every byte, between `begin` (if any) and `end`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), end, *([begin] if begin else [])]
    vocabulary = {token: index for index, token in enumerate(alphabet)}
    fast = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    tokens = [(token, vocabulary[token]) for token in (begin, end) if token]
    if begin:
        fast.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A {end}", special_tokens=tokens
        )
    names = {"eos_token": end, "pad_token": end} | ({"bos_token": begin} if begin else {})
    return PreTrainedTokenizerFast(tokenizer_object=fast, model_max_length=length, **names)


def words():
    """The tokenizer of CLIP."""
    return tokenizer(LENGTH, "<begin>", "<end>")


def clip(key: int, class_name: str = "CLIPTextModelWithProjection", hidden: int = 32) -> nn.Module:
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=258,
        hidden_size=hidden,
        intermediate_size=64,
        projection_dim=hidden,
        num_hidden_layers=2,
        num_attention_heads=1,
        max_position_embeddings=LENGTH,
        bos_token_id=257,
        eos_token_id=256,
        pad_token_id=256,
    )
    return fill_(getattr(transformers, class_name)(config), key)


def t5(key: int):
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=257,
        d_model=64,
        d_kv=32,
        d_ff=64,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        eos_token_id=256,
        pad_token_id=256,
    )
    return fill_(T5EncoderModel(config), key)


def transformer(key: int):
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=4,
        num_layers=2,
        attention_head_dim=64,
        num_attention_heads=1,
        joint_attention_dim=64,
        caption_projection_dim=64,
        pooled_projection_dim=64,
        in_channels=16,
        out_channels=16,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    return fill_(model, key)


def vae(channels: int, key: int, **settings) -> nn.Module:
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=channels,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=SIDE,
        **settings,
    )
    return fill_(model, key)


def write_pipeline(folder: Path) -> Path:
    """A whole pipeline in the shape of Stable Diffusion 3.5, of a quarter of a million numbers."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    parts = {
        "transformer": transformer(1),
        "vae": vae(
            16,
            2,
            scaling_factor=1.5,
            shift_factor=0.0625,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        "text_encoder": clip(3),
        "text_encoder_2": clip(4),
        "text_encoder_3": t5(5),
        "tokenizer": words(),
        "tokenizer_2": words(),
        "tokenizer_3": tokenizer(LENGTH, "", "<end>"),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    kinds = {name: ["any", type(part).__name__] for name, part in parts.items()}
    index = {"_class_name": "StableDiffusion3Pipeline", **kinds}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def write_llama(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=256,
        bos_token_id=None,
        eos_token_id=256,
    )
    fill_(LlamaForCausalLM(config), 6).save_pretrained(folder)
    tokenizer(64, "", "<end>").save_pretrained(folder)
    return folder
