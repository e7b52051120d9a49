"""Runs that an earlier commit made, and the models and data that they were made of.

`tests/runs/old/` was written by this file with the package of commit 2c28506, on one thread:

    git worktree add /tmp/old 2c28506
    OMP_NUM_THREADS=1 PYTHONPATH=/tmp/old python tests/runs/old_runs.py tests/runs/old

Models are made by code: their weights are integers of a documented random generator, divided by a
power of two, so they have the same bits everywhere. Never change what is made here: the stored runs
are of these bits.
"""

import contextlib
import hashlib
import io
import json
import os
import platform
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

ROOT = "@ROOT@"  # stands in stored files for the folder that images and runs lie in
PROMPT_FILE = "prompts.txt"
PROMPTS = ("a red square", "blue")
STYLE = ("sample.steps=2", "sample.every=3", "train.checkpoint_every=2", "data.batch_size=3")
MOMENTUM = ("train.optimizer=momentum", "qzo.parametrization=dense", "qzo.per_example=false")
LLM = ("data.batch_size=4", "data.train_examples=12", "data.validation_examples=4")
LLM += ("train.validate_every=2", "train.checkpoint_every=2")
RUNS = {
    "default": ("train", *STYLE, "--max-steps", "6"),
    "momentum": ("train", *STYLE, *MOMENTUM, "--max-steps", "6"),
    "llm": ("llm", "train", *LLM, "--max-steps", "6"),
    "codes": ("llm", "train", *LLM, "--max-steps", "6", "--method", "quzo", "qzo.layers=[q_proj]"),
}
"""Name -> command line. Each is stored as it ended, and as it was when stopped after four steps."""


LEFT_OUT = {
    "whole": ["checkpoints", "tensorboard"],
    "stopped": ["step_000002", "tensorboard"],
    "delta": [],
}
"""Part of a run -> the files and folders in it that are not stored."""


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


def clip(key: int):
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=1,
        max_position_embeddings=24,
        bos_token_id=257,
        eos_token_id=256,
        pad_token_id=256,
    )
    return fill_(CLIPTextModelWithProjection(config), key)


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


def vae(key: int):
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=1.5,
        shift_factor=0.0625,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return fill_(model, key)


def write_pipeline(folder: Path) -> Path:
    """A whole pipeline in the shape of Stable Diffusion 3.5, of a quarter of a million numbers."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    parts = {
        "transformer": transformer(1),
        "vae": vae(2),
        "text_encoder": clip(3),
        "text_encoder_2": clip(4),
        "text_encoder_3": t5(5),
        "tokenizer": tokenizer(24, "<begin>", "<end>"),
        "tokenizer_2": tokenizer(24, "<begin>", "<end>"),
        "tokenizer_3": tokenizer(24, "", "<end>"),
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


def write_inputs(root: Path) -> None:
    """Models, images and data below `root`, for every run."""
    write_pipeline(root / "pipeline")
    write_llama(root / "llama")
    (root / PROMPT_FILE).write_text("\n".join(PROMPTS) + "\n")
    shutil.copytree(Path(__file__).with_name("old") / "images", root / "images")
    (root / "films").mkdir()
    for name, count in (("train.tsv", 16), ("dev.tsv", 4)):
        rows = [f"a {('bad', 'good')[i % 2]} film {name[0]}{i}\t{i % 2}" for i in range(count)]
        (root / "films" / name).write_text("\n".join(rows) + "\n")


def command(name: str, out: str) -> list[str]:
    """The command line of a run into `out`, in fp32, from the folder with the inputs."""
    places = {
        "train": [
            "--model",
            "pipeline",
            "--style-dir",
            "images",
            "--sample-prompts",
            "prompts.txt",
        ],
        "llm": ["--task", "sst2", "--model", "llama", "--data-dir", "films"],
    }
    verb, *rest = RUNS[name]
    end = ["--output-dir", out, "compute.dtype=float32"]
    if verb == "train":
        end += ["compute.device=cpu", "train.micro_batch_size=4", "data.cache_dir=cache"]
    return [verb, *rest, *places[verb], *end]


def arithmetic() -> str:
    """Identifies how this machine and this torch round what a model computes, without any code of
    the package: runs are equal bit for bit only where this is."""
    model = fill_(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)), 7)
    x = torch.arange(-2048, 2048).view(4, 16, 64).float() / 512
    digest = hashlib.blake2b(digest_size=16)
    heads = model(x).view(4, 16, 2, 32).transpose(1, 2)
    mixed = nn.functional.scaled_dot_product_attention(heads, heads, heads)
    image = nn.functional.conv2d(mixed, torch.ones(2, 2, 3, 3) / 7, padding=1)
    for tensor in (model(x), mixed, image, torch.nn.functional.layer_norm(image, (32,)).exp()):
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def hash_of(folder: Path) -> str:
    """Of every tensor of a folder's safetensors files, by name."""
    from safetensors.torch import load_file

    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(folder.glob("**/*.safetensors")):
        for name, tensor in sorted(load_file(file).items()):
            digest.update(f"{file.name} {name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _stop_after(steps: int) -> None:
    """From now on SIGTERM comes to this process when that many steps were recorded."""
    from qzo_diffusion.train.tracking import Tracker

    plain = Tracker.on_step

    def on_step(self, record, *rest):
        plain(self, record, *rest)
        if record.step + 1 == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    Tracker.on_step = on_step


def _make(root: Path, out: Path) -> None:
    from qzo_diffusion.cli import main

    write_inputs(root)
    os.chdir(root)
    facts = {"arithmetic": arithmetic(), "exports": {}}
    for name in RUNS:
        assert main(command(name, f"{name}/whole")) == 0
        for kind in ("delta", "bf16", "nf4"):
            arguments = ["export", "--run", f"{name}/whole", "--format", kind]
            if name in ("default", "momentum"):
                assert main([*arguments, "--output-dir", f"{name}/{kind}"]) == 0
                facts["exports"][f"{name} {kind}"] = hash_of(root / name / kind)
    _stop_after(4)
    for name in RUNS:
        assert main(command(name, f"{name}/stopped")) == 130
    for name in RUNS:
        for part, left_out in LEFT_OUT.items():
            if (root / name / part).is_dir():
                keep = shutil.ignore_patterns("report.html", *left_out)
                shutil.copytree(root / name / part, out / name / part, ignore=keep)
    for file in [*out.glob("*/*/config.yaml"), *out.glob("*/*/environment.json")]:
        if not (file.parent / "COMPLETE").exists():  # which has hashes of what lies beside it
            text = file.read_text().replace(str(root), ROOT)
            file.write_text(text.replace(platform.platform(), "Linux"))
    (out / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    made = Path("/tmp/old_runs")  # its name is in what cannot be changed afterwards
    made.mkdir()
    with contextlib.redirect_stdout(io.StringIO()):
        _make(made, Path(sys.argv[1]).resolve())
