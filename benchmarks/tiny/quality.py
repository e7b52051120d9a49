"""How well the embedded model draws: `python -m benchmarks.tiny.quality --data FOLDER`.

Two hundred taught prompts go through the plain diffusers pipeline; each drawing is put back through
the autoencoder, and it counts when the prompted drawing is the nearest of 64 (the prompted one and
63 other concepts of the same style) in scaled latents."""

import argparse
import json
import os
import platform
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from PIL import Image, ImageDraw
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.tiny.architecture import PROMPT_TOKENS
from benchmarks.tiny.drawings import Drawings, load_drawings, taught_concepts, taught_styles
from benchmarks.tiny.export import EXPORT_FOLDER, folder_bytes
from benchmarks.tiny.pipeline import scaled_latents

ROOT = Path(__file__).parents[2]
RESULT_FILE = ROOT / "benchmarks/results/tiny_quality.json"
GRID_FILE = ROOT / "docs/images/tiny_prompts.png"
KEPT_UNQUANTIZED = ("pos_embed", "time_text_embed", "context_embedder", "norm_out", "proj_out")
GRID_SUBJECTS = (
    *("red apple", "banana", "pizza", "cat face", "panda", "sun", "rocket", "red heart"),
    *("guitar", "snowman", "sunflower", "mushroom", "sailboat", "ghost", "hamburger", "penguin"),
)
# no drawing of it was trained on: the autoencoder must carry it for style tuning
UNSEEN_STYLE = "fluent_mono"


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


def _rivals(
    drawings: Drawings, index: int, generator: torch.Generator, count: int = 63
) -> list[int]:
    style = drawings.captions[index].removeprefix(drawings.names[index])
    others = [
        i
        for i in range(len(drawings))
        if i != index and drawings.captions[i].removeprefix(drawings.names[i]) == style
    ]
    order = torch.randperm(len(others), generator=generator)[:count]
    return [others[int(i)] for i in order]


def top1_of_64(
    pipe: StableDiffusion3Pipeline, drawings: Drawings, sampling: Sampling, count: int = 200
) -> dict[str, object]:
    generator = torch.Generator().manual_seed(20)
    chosen = torch.randperm(len(drawings), generator=generator)[:count].tolist()
    images = draw(pipe, [drawings.captions[i] for i in chosen], sampling)
    drawn = scaled_latents(pipe.vae, images).flatten(1)
    truth = scaled_latents(pipe.vae, drawings.images).flatten(1)
    hits: dict[str, list[bool]] = defaultdict(list)
    errors = (truth[chosen] - drawn).square().mean(1).sqrt()  # scaled latents have deviation 1
    for row, index in enumerate(chosen):
        candidates = [index, *_rivals(drawings, index, generator)]
        distances = (truth[candidates] - drawn[row]).norm(dim=1)
        style = drawings.captions[index].rpartition(", ")[2]
        hits[style].append(int(distances.argmin()) == 0)
    every = [hit for some in hits.values() for hit in some]
    per_style = {
        style: {"top1": round(sum(some) / len(some), 4), "n": len(some)}
        for style, some in hits.items()
    }
    return {
        "top1_of_64": round(sum(every) / len(every), 4),
        "n": len(every),
        "latent_rms_error": round(errors.mean().item(), 4),
        "per_style": per_style,
    }


def autoencoder_psnr(pipe: StableDiffusion3Pipeline, data: Path) -> dict[str, float]:
    """Mean PSNR in dB per style, of the taught concepts; the last style was never trained on."""
    result = {}
    for style in [*taught_styles(), UNSEEN_STYLE]:
        images = load_drawings(data, {style: style}, taught_concepts()).images
        errors = []
        for part in images.split(32):
            target = part.float() / 255
            with torch.no_grad():
                decoded = pipe.vae.decode(pipe.vae.encode(2 * target - 1).latent_dist.mean).sample
            errors.append(((decoded.clamp(-1, 1) / 2 + 0.5 - target) ** 2).mean((1, 2, 3)))
        result[style] = round(float((-10 * torch.cat(errors).log10()).mean()), 2)
    return result


def prompt_grid(
    pipe: StableDiffusion3Pipeline, sampling: Sampling, columns: int = 8, zoom: int = 2
) -> Image.Image:
    """Sixteen well-known subjects in the first style, then in the second, each with its name."""
    prompts = [
        f"{subject}, {words}" for words in taught_styles().values() for subject in GRID_SUBJECTS
    ]
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


def report(data: Path, folder: Path, sampling: Sampling, count: int) -> dict[str, object]:
    drawings = load_drawings(data, taught_styles(), taught_concepts())
    figures: dict[str, object] = {}
    for name, nf4 in (("bf16", False), ("nf4", True)):
        pipe = load_pipeline(folder, nf4=nf4)
        began = time.monotonic()
        measured = top1_of_64(pipe, drawings, sampling, count)
        figures[name] = {**measured, "seconds": round(time.monotonic() - began, 1)}
        if nf4:  # what users of the project run
            GRID_FILE.parent.mkdir(parents=True, exist_ok=True)
            prompt_grid(pipe, sampling).save(GRID_FILE, optimize=True)
        else:
            figures["autoencoder_psnr_db"] = autoencoder_psnr(pipe, data)
            figures["scheduler_shift"] = pipe.scheduler.config.shift
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
        "figures": figures,
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
