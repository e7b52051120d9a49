"""Runs that an earlier commit made, and the models and data that they were made of.

`tests/runs/old/` was written by this file with the package of commit 2c28506, on one thread:

    git worktree add /tmp/old 2c28506
    OMP_NUM_THREADS=1 PYTHONPATH=/tmp/old:. python tests/runs/old_runs.py tests/runs/old

Their models are made by code (`tests/small_pipeline.py`).
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

import torch
from torch import nn

from tests.small_pipeline import fill_, write_llama, write_pipeline

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
