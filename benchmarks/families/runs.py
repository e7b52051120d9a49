"""Train, export and load a small model of a family, as a person does."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.families.small import SIDE
from qzo_diffusion.cli import main
from qzo_diffusion.config.files import make_config, read_yaml
from qzo_diffusion.core.merge import merge_changes_
from qzo_diffusion.core.noise import torch_generator
from qzo_diffusion.diffusion.families.family import Family
from qzo_diffusion.diffusion.flow_matching import Batch
from qzo_diffusion.quant.config_file import read_config
from qzo_diffusion.quant.load import handles_of
from qzo_diffusion.runs.style import pipeline
from qzo_diffusion.runs.tuned import load_scales
from qzo_diffusion.system.reading import parse_json, read_json_lines

CPU = torch.device("cpu")


def write_pictures(folder: Path, count: int = 8, green: int = 20) -> Path:
    folder.mkdir(parents=True)
    for index in range(count):
        colour = (30 * index, green, 255 - 30 * index)
        Image.new("RGB", (SIDE, SIDE), colour).save(folder / f"{index}.png")
    return folder


def train(model: Path, out: Path, *settings: str) -> Path:
    """Train on the pictures beside `out` and return the run. Raises RuntimeError if it fails."""
    pictures, others = out.parent / "pictures", out.parent / "others"
    if not pictures.is_dir():
        write_pictures(pictures)
        write_pictures(others, 4, green=30)
    data = ["--style-dir", str(pictures), "--validation-dir", str(others)]
    return _train(model, out, *data, "--caption", "a square", *settings)


def train_on_reward(model: Path, out: Path, *settings: str) -> Path:
    """Train for bright pictures and return the run. Raises RuntimeError if it fails."""
    prompts = write_prompts(out.parent, "trained.txt", "red", "blue")
    data = ["--reward", "brightness", "--prompts", str(prompts)]
    return _train(model, out, *data, "reward.second=none", "reward.steps=2", *settings)


def write_prompts(folder: Path, name: str = "prompts.txt", *prompts: str) -> Path:
    (file := folder / name).write_text("\n".join(prompts or ("a square",)), encoding="utf-8")
    return file


def _train(model: Path, out: Path, *settings: str) -> Path:
    command = ["train", "--model", str(model), "--output-dir", str(out)]
    command += ["--sample-prompts", str(write_prompts(out.parent))]
    command += ["compute.device=cpu", "compute.dtype=float32", "sample.every=0", "sample.steps=2"]
    command += [f"data.resolution={SIDE}", "train.checkpoint_every=0", "train.validate_every=0"]
    command += [f"data.cache_dir={out.parent / 'cache'}", *settings]
    _succeed(command)
    return out


def export(run: Path, kind: str, folder: Path | None = None) -> Path:
    """Export a run beside it or into `folder`. Return where. Raises RuntimeError if it fails."""
    out = (folder or run.parent) / f"{run.name}_{kind}"
    _succeed(["export", "--run", str(run), "--format", kind, "--output-dir", str(out)])
    return out


def _succeed(command: list[str]) -> None:
    if main(command) != 0:
        raise RuntimeError(f"failed: qzo-diffuse {' '.join(command)}")


def held_out_losses(run: Path) -> tuple[float, float]:
    """Return the held-out loss before the first step and after the last."""
    found = [
        float(line["validation_loss"])
        for line in map(parse_json, read_json_lines(run / "metrics.jsonl"))
        if "validation_loss" in line
    ]
    return found[0], found[-1]


def tuned_model(run: Path) -> tuple[nn.Module, Family]:
    """Return the model with the run's scales, and its family."""
    config = make_config(read_yaml(run / "config.yaml"))
    runtime = pipeline.find_runtime(config)
    model, scales, _ = pipeline.load_base(config, runtime)
    merge_changes_(scales, [(load_scales(run)[0], 1.0)])
    return model, pipeline.family_of(config, runtime.folder)


def some_batch(model: Path, family: Family) -> Batch:
    """Return an example of random latents and prompt in the shapes of a small model."""
    cache = {"cache_dir": tempfile.mkdtemp(prefix="families")}
    config = make_config({"model": str(model), "data": cache})
    own = family.denoiser.shape(read_config(model / family.denoiser.part / "config.json"))
    generator = torch_generator(0, 0, "families")
    shape = (2, own.channels, SIDE // 8, SIDE // 8)
    latents, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    encoder = pipeline.prompt_encoder(config, model, CPU, torch.float32)
    prompt = encoder.encode(["a square"])["a square"]
    embeds, pooled = (one.expand(2, *one.shape) for one in (prompt.embeds, prompt.pooled))
    objective = pipeline.objective_of(config, model)
    sigma = torch.tensor([0.3, 0.8])
    return Batch(latents, noise, sigma, embeds, pooled, objective=objective)


def prediction(model: nn.Module, family: Family, batch: Batch) -> Tensor:
    with torch.no_grad():
        return family.denoiser.predict(model, batch, torch.float32)


def plain(folder: Path, family: Family, dtype: torch.dtype) -> Any:
    """Load an export by diffusers alone. Layers of bitsandbytes keep their scales in fp32."""
    import diffusers

    kind = getattr(diffusers, family.denoiser.class_name)
    with _on_a_cpu():
        model = kind.from_pretrained(folder, torch_dtype=dtype, device_map="cpu")
    for handle in handles_of(model):
        handle.module.support_avx512bf16_for_cpu = False  # or it rounds its scales to bfloat16
    return model


@contextmanager
def _on_a_cpu() -> Iterator[None]:
    """Diffusers refuses 4-bit models on a machine without a GPU, although bitsandbytes runs
    there.
    """
    from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer

    with mock.patch.object(BnB4BitDiffusersQuantizer, "validate_environment", return_value=None):
        yield


def export_errors(model: Path, run: Path) -> dict[str, float]:
    """Return, for each format, how far the prediction of plain diffusers is from the tuned model's,
    as a share of it.
    """
    tuned, family = tuned_model(run)
    batch = some_batch(model, family)
    wanted = prediction(tuned, family, batch)
    errors = {}
    for kind, dtype in (("nf4", torch.float32), ("bf16", torch.bfloat16)):
        loaded = plain(export(run, kind), family, dtype)
        got = prediction(loaded.float() if kind == "bf16" else loaded, family, batch)
        errors[kind] = float((got - wanted).norm() / wanted.norm())
    return errors
