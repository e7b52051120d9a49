"""Write the embedded model: diffusers layout, bf16 safetensors, under 40 MB, swapped in whole."""

import copy
import json
import os
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline

from benchmarks.tiny.architecture import PROMPT_TOKENS
from benchmarks.tiny.drawings import LESSONS_FILE
from benchmarks.tiny.pipeline import TextToVelocity, assemble

LIMIT_BYTES = 40_000_000
EXPORT_FOLDER = Path(__file__).parents[2] / "qzo_diffusion/models/tiny"
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _load_as_float32(folder: Path) -> None:
    """transformers loads a model in its config's dtype and diffusers in float32; say float32, or
    the parts do not fit together.
    """
    for name in TEXT_ENCODERS:
        path = folder / name / "config.json"
        config = json.loads(path.read_text())
        config["dtype"] = "float32"
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _check(folder: Path) -> None:
    size = folder_bytes(folder)
    if size >= LIMIT_BYTES:
        raise ValueError(f"the embedded model has {size} bytes; the limit is {LIMIT_BYTES}")
    pipe = StableDiffusion3Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    image = pipe(
        "red apple, noto style",
        num_inference_steps=2,
        guidance_scale=2.0,
        max_sequence_length=PROMPT_TOKENS,
        height=64,
        width=64,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    if image.size != (64, 64):
        raise ValueError(f"the reloaded pipeline drew {image.size}, not 64x64")


def export(
    vae: AutoencoderKL, model: TextToVelocity, *, shift: float, target: Path = EXPORT_FOLDER
) -> int:
    """Replace `target` as a whole; concepts.json there says what was taught.

    Returns the size in bytes.
    """
    aside = target.with_name(target.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    pipe = assemble(copy.deepcopy(vae), copy.deepcopy(model), shift).to(dtype=torch.bfloat16)
    pipe.save_pretrained(aside)
    _load_as_float32(aside)
    _check(aside)
    shutil.copy(LESSONS_FILE, aside / "concepts.json")
    for path in aside.rglob("*"):
        # safetensors writes files that only their owner can read
        path.chmod(0o755 if path.is_dir() else 0o644)
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(aside, target)
    shutil.rmtree(old, ignore_errors=True)
    return folder_bytes(target)
