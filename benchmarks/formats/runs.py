"""Short runs on a small pipeline, their exports, and the same models as diffusers reads them."""

import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qzo_diffusion.cli import main as command_line
from qzo_diffusion.config.files import make_config, read_yaml
from qzo_diffusion.core.merge import merge_changes_
from qzo_diffusion.runs.style import pipeline
from qzo_diffusion.runs.tuned import load_scales
from tests.small_models import sd3_inputs

FILE = "diffusion_pytorch_model.safetensors"
STEPS = 20
WIDE = 4  # heads of 64: a quantizer leaves much smaller layers as they are
QUICK = ["data.batch_size=1", "sample.every=0", "sample.steps=1", "train.calibrate_lr=false"]


def run(folder: Path, model: Path, images: Path, steps: int, *settings: str) -> Path:
    """Train on captioned images for this many steps; return the run's folder, new in `folder`."""
    target = folder / f"run_{steps}"
    places = ["--model", model, "--style-dir", images, "--output-dir", target]
    more = [f"data.cache_dir={folder / 'cache'}", *QUICK, *settings]
    _call("train", *places, "--max-steps", steps, *more)
    return target


def exported(folder: Path, kind: str) -> Path:
    """Export a run as `kind`; return the export's folder, beside the run's."""
    target = folder.with_name(f"{folder.name}_out")
    _call("export", "--run", folder, "--format", kind, "--output-dir", target)
    return target


def _call(*arguments: object) -> None:
    with redirect_stdout(sys.stderr):
        code = command_line([str(one) for one in arguments])
    if code:
        raise RuntimeError(f"exit code {code} of {arguments[0]}")


@dataclass(frozen=True)
class Tuned:
    """A model with its tuned scales, and the scales of its base."""

    model: nn.Module
    base: Mapping[str, Tensor]
    scales: Mapping[str, Tensor]


def tuned(folder: Path) -> Tuned:
    """The model of a run as it is read here, in fp32 on the CPU."""
    raw = read_yaml(folder / "config.yaml")
    config = make_config({**raw, "compute": {"device": "cpu", "dtype": "float32"}})
    model, scales, _ = pipeline.load_base(config, pipeline.find_runtime(config))
    base = {name: scales[name].clone() for name in scales}
    merge_changes_(scales, [(load_scales(folder)[0], 1.0)])
    return Tuned(model, base, {name: scales[name] for name in scales})


def by_diffusers(folder: Path) -> nn.Module:
    from diffusers import SD3Transformer2DModel

    model: nn.Module = SD3Transformer2DModel.from_pretrained(folder, torch_dtype=torch.float32)
    return model.requires_grad_(False)


@torch.no_grad()
def forward(model: Any) -> Tensor:
    """Predictions for random inputs."""
    result: Tensor = model(**sd3_inputs(model)).sample
    return result


def distance(one: Tensor, other: Tensor) -> float:
    """Relative, to three digits."""
    return float(f"{float((one - other).norm() / other.norm()):.2e}")
