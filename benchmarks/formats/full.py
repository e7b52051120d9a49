"""A GGUF file in the shape of SD3.5 Large: memory and time of a step over plain forwards."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.full_size import stepping
from benchmarks.full_size.stepping import DEFAULT
from benchmarks.full_size.weights import need_disk, status, synthetic
from benchmarks.sd35_full_size.model import LARGE, batch_of, config_of, import_everything
from benchmarks.sd35_full_size.stepping import SIDE

LAYERS: int = LARGE["num_layers"]  # type: ignore[assignment]
KIND: Literal["Q4_0"] = "Q4_0"
STAGES = ("write", "foreign", "ours")


def full(folder: Path, layers: int, count: int, stage: str | None) -> dict[str, Any]:
    """Run all stages, each in a process of its own; the peak of one must not hide another's."""
    if stage is not None:
        return run_stage(stage, folder, layers, count)
    figures: dict[str, Any] = {}
    for name in STAGES:
        command = [sys.executable, "-m", "benchmarks.formats", "full", "--folder", str(folder)]
        command += ["--layers", str(layers), "--steps", str(count), "--stage", name]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        figures[name] = json.loads(output.strip().splitlines()[-1])
        print(name, figures[name], file=sys.stderr)
    peak = max(figures["ours"]["loaded_peak_rss_gb"], figures["ours"]["step_peak_rss_gb"])
    return figures | {
        "memory_over_inference": round(peak / figures["ours"]["inference_peak_rss_gb"], 4),
        "memory_over_diffusers": round(peak / figures["foreign"]["inference_peak_rss_gb"], 4),
        "step_over_forwards": figures["ours"]["step_over_two_forwards"],
    }


def run_stage(stage: str, folder: Path, layers: int, count: int) -> dict[str, Any]:
    file = folder / f"large-{layers}-{KIND}.gguf"
    if stage == "write":
        return write(file, layers)
    if stage == "foreign":
        return foreign(file, layers)
    from qzo_diffusion.diffusion.families.sd3 import SD3

    import_everything()
    return stepping.steps_of(
        SD3, lambda: load(file), lambda model: batch_of(model, SIDE), count, DEFAULT
    )


def write(file: Path, layers: int) -> dict[str, Any]:
    """Random codes, and factors of a size that gives weights as an initialized layer has."""
    from qzo_diffusion.diffusion.families.sd3 import SD3
    from qzo_diffusion.diffusion.families.sd3_layout import SD3_LAYOUT
    from qzo_diffusion.diffusion.original_layout import PREFIX
    from qzo_diffusion.diffusion.transformer import empty_transformer
    from qzo_diffusion.quant.gguf_make import PLAIN, Target, type_of, write_file
    from qzo_diffusion.quant.weights import Pending

    need_disk(file.parent, 0.14 * layers)
    state = empty_transformer(config_of(layers)).state_dict()
    pending = {name: Pending.of(tensor) for name, tensor in state.items()}
    original = SD3_LAYOUT.to_original(pending, config_of(layers))
    shapes = {name.removeprefix(PREFIX): one.shape for name, one in original.items()}
    target = Target(file, KIND, SD3.gguf[0], SD3.gguf_kept)
    kinds = {name: type_of(name, shape, target) for name, shape in shapes.items()}
    generator, numbers = torch.Generator().manual_seed(0), np.random.default_rng(0)

    def data(name: str) -> np.ndarray:
        shape = shapes[name]
        if kinds[name] in PLAIN:
            return synthetic(shape, generator, torch.float32).numpy().astype(PLAIN[kinds[name]])
        blocks = numbers.integers(0, 256, (shape[0], shape[1] // 32, 18), dtype=np.uint8)
        # codes are uniform in -8 .. 7, whose spread is 4.6
        factors = np.full((*blocks.shape[:2], 1), shape[1] ** -0.5 / 4.6, "<f2")
        blocks[..., :2] = factors.view(np.uint8)
        return blocks.reshape(shape[0], -1)

    write_file(target, kinds, shapes, data)
    return {"bytes": file.stat().st_size}


def load(file: Path) -> nn.Module:
    from qzo_diffusion.diffusion.transformer import empty_transformer, find_transformer
    from qzo_diffusion.quant.stream import Quantization, fill_

    found = find_transformer(file)
    model = empty_transformer(found.config)
    fill_(model, found.entries, Quantization(), dtype=torch.bfloat16, device=torch.device("cpu"))
    return model


def foreign(file: Path, layers: int) -> dict[str, Any]:
    """One forward at 256 pixels by diffusers, and the peak of loading and of the forward."""
    from diffusers import GGUFQuantizationConfig, SD3Transformer2DModel

    from benchmarks.resident import reset_peak
    from qzo_diffusion.diffusion.families.family import model_loss
    from qzo_diffusion.diffusion.families.sd3 import SD3

    config = file.parent / "config"
    config.mkdir(exist_ok=True)
    (config / "config.json").write_text(json.dumps(config_of(layers)))
    model = SD3Transformer2DModel.from_single_file(
        str(file),
        config=str(config),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.bfloat16),
        dtype=torch.bfloat16,
    )
    loaded = status("VmHWM")
    reset_peak()
    with torch.no_grad():
        loss: Tensor = model_loss(SD3, model, batch_of(model, SIDE), torch.bfloat16)
    return {
        "loaded_peak_rss_gb": round(loaded, 3),
        "inference_peak_rss_gb": round(status("VmHWM"), 3),
        "loss": float(loss.mean()),
    }
