"""How well the embedded model draws: `python -m benchmarks.tiny.quality --data FOLDER`.

Taught prompts go through the plain diffusers pipeline; each drawing is put back through the
autoencoder and compared with true ones (nearest.py)."""

import argparse
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from PIL import Image, ImageDraw
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.tiny.architecture import PROMPT_TOKENS
from benchmarks.tiny.drawings import Knowledge, load_drawings, read_knowledge
from benchmarks.tiny.export import EXPORT_FOLDER, folder_bytes
from benchmarks.tiny.nearest import Draw, nearest_style, nearest_treatment, top1_of_64

ROOT = Path(__file__).parents[2]
RESULT_FILE = ROOT / "benchmarks/results/tiny_quality.json"
GRID_FILE = ROOT / "docs/images/tiny_prompts.png"
KEPT_UNQUANTIZED = ("pos_embed", "time_text_embed", "context_embedder", "norm_out", "proj_out")
GRID_SUBJECTS = (
    *("red apple", "banana", "pizza", "cat face", "panda", "sun", "rocket", "red heart"),
    *("guitar", "snowman", "sunflower", "mushroom", "sailboat", "ghost", "hamburger", "penguin"),
)
# no drawing of them was trained on: the autoencoder must carry them for style tuning
UNSEEN_STYLES = ("fluent_mono", "fluent3d", "openmoji")


@dataclass(frozen=True)
class Sampling:
    steps: int = 20
    guidance: float = 2.0
    batch: int = 20


def quantize_nf4(transformer: nn.Module) -> int:
    """Replace the linears that the project quantizes by bitsandbytes NF4 ones, block 64; returns
    how many.
    """
    import bitsandbytes as bnb

    chosen = [
        name
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and name.split(".")[0] not in KEPT_UNQUANTIZED
    ]
    for name in chosen:
        parent_name, _, leaf = name.rpartition(".")
        parent = transformer.get_submodule(parent_name)
        linear = parent.get_submodule(leaf)
        packed = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=linear.weight.dtype,
            compress_statistics=False,
            quant_type="nf4",
        )
        packed.load_state_dict(linear.state_dict())
        # its packed layout computes in bf16 whatever the input is
        packed.support_avx512bf16_for_cpu = False
        setattr(parent, leaf, packed.to("cpu"))
    return len(chosen)


def load_pipeline(
    folder: Path, *, nf4: bool = False, shift: float | None = None
) -> StableDiffusion3Pipeline:
    pipe = StableDiffusion3Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if shift is not None:
        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
            pipe.scheduler.config, shift=shift
        )
    if nf4:
        quantize_nf4(pipe.transformer)
    return pipe


def draw(
    pipe: StableDiffusion3Pipeline, prompts: Sequence[str], sampling: Sampling, first_seed: int = 0
) -> Tensor:
    """uint8 images [N, 3, 64, 64]; the image at position i depends on its prompt and seed
    first_seed + i alone.
    """
    parts = []
    for start in tqdm(range(0, len(prompts), sampling.batch), desc="drawing"):
        some = list(prompts[start : start + sampling.batch])
        images = pipe(
            some,
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
            max_sequence_length=PROMPT_TOKENS,
            height=64,
            width=64,
            generator=[
                torch.Generator().manual_seed(first_seed + start + i) for i in range(len(some))
            ],
            output_type="np",
        ).images
        parts.append(torch.from_numpy((images * 255).round().astype(np.uint8)).permute(0, 3, 1, 2))
    return torch.cat(parts)


def autoencoder_psnr(
    pipe: StableDiffusion3Pipeline, data: Path, known: Knowledge
) -> dict[str, float]:
    """Mean PSNR in dB per style, of the taught concepts; the last styles were never trained on."""
    result = {}
    for style in [*known.styles, *UNSEEN_STYLES]:
        images = load_drawings(data, {style: style}, known.concepts).images
        errors = []
        for part in images.split(32):
            target = part.float() / 255
            with torch.no_grad():
                decoded = pipe.vae.decode(pipe.vae.encode(2 * target - 1).latent_dist.mean).sample
            errors.append(((decoded.clamp(-1, 1) / 2 + 0.5 - target) ** 2).mean((1, 2, 3)))
        result[style] = round(float((-10 * torch.cat(errors).log10()).mean()), 2)
    return result


def grid_prompts(known: Knowledge) -> list[str]:
    """Sixteen well-known subjects in each style, then eight with each treatment."""
    plain = [f"{subject}, {words}" for words in known.styles.values() for subject in GRID_SUBJECTS]
    return plain + [
        f"{subject}, {name}" for name in known.treatments for subject in GRID_SUBJECTS[:8]
    ]


def prompt_grid(
    pipe: StableDiffusion3Pipeline, known: Knowledge, sampling: Sampling, columns: int = 8
) -> Image.Image:
    """Drawings at twice their size, each with its prompt."""
    prompts, zoom = grid_prompts(known), 2
    images = draw(pipe, prompts, sampling, first_seed=1000)
    cell, label = 64 * zoom, 14
    rows = -(-len(prompts) // columns)
    grid = Image.new("RGB", (columns * cell, rows * (cell + label)), "white")
    pen = ImageDraw.Draw(grid)
    for i, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        x, y = i % columns * cell, i // columns * (cell + label)
        tile = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(
            (cell, cell), Image.Resampling.LANCZOS
        )
        grid.paste(tile, (x, y))
        pen.text((x + 4, y + cell), prompt.replace(" style", ""), fill="black")
    return grid


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.split(": ", 1)[1] for line in lines if line.startswith("model name")),
        platform.processor(),
    )


def how_near(draws: Draw, data: Path, known: Knowledge, count: int) -> dict[str, object]:
    drawings = load_drawings(data, known.styles, known.concepts)
    found: dict[str, object] = dict(top1_of_64(draws, drawings, count))
    if len(known.styles) > 1:
        found["nearest_style"] = nearest_style(draws, data, known, count)
    if known.treatments:
        found["nearest_treatment"] = nearest_treatment(draws, drawings, known.treatments)
    return found


def figures_of(data: Path, folder: Path, sampling: Sampling, count: int) -> dict[str, object]:
    known, figures = read_knowledge(folder / "concepts.json"), {}
    for name, nf4 in (("bf16", False), ("nf4", True)):
        pipe = load_pipeline(folder, nf4=nf4)
        began = time.monotonic()
        draws = Draw(pipe.vae, partial(draw, pipe, sampling=sampling))
        measured = how_near(draws, data, known, count)
        figures[name] = {**measured, "seconds": round(time.monotonic() - began, 1)}
        if nf4:  # what users of the project run
            GRID_FILE.parent.mkdir(parents=True, exist_ok=True)
            prompt_grid(pipe, known, sampling).save(GRID_FILE, optimize=True)
        else:
            figures["autoencoder_psnr_db"] = autoencoder_psnr(pipe, data, known)
            figures["scheduler_shift"] = pipe.scheduler.config.shift
    return figures


def report(data: Path, folder: Path, sampling: Sampling, count: int) -> dict[str, object]:
    packages = ("torch", "diffusers", "transformers", "tokenizers", "bitsandbytes")
    return {
        "command": "python -m benchmarks.tiny.quality --data FOLDER",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": {
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
        "model_bytes": folder_bytes(folder),
        "sampling": {
            "steps": sampling.steps,
            "guidance": sampling.guidance,
            "max_sequence_length": PROMPT_TOKENS,
        },
        "figures": figures_of(data, folder, sampling, count),
    }


def write_report(
    data: Path, sampling: Sampling, *, folder: Path = EXPORT_FOLDER, count: int = 200
) -> None:
    result = report(data, folder, sampling, count)
    RESULT_FILE.parent.mkdir(parents=True, exist_ok=True)
    RESULT_FILE.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["figures"], indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with emoji64.npz and meta.json"
    )
    parser.add_argument("--folder", type=Path, default=EXPORT_FOLDER)
    parser.add_argument("--steps", type=int, default=Sampling.steps)
    parser.add_argument("--guidance", type=float, default=Sampling.guidance)
    parser.add_argument("--count", type=int, default=200)
    args = parser.parse_args()
    write_report(
        args.data,
        Sampling(steps=args.steps, guidance=args.guidance),
        folder=args.folder,
        count=args.count,
    )


if __name__ == "__main__":
    main()
