"""Folders that the `sdnq` package of PyPI quantizes: read, tuned and written back here, and read by
diffusers with that package.

The package stands under the GPL, and nothing here needs it, so it is no extra of this project."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.formats.runs import (
    FILE,
    STEPS,
    WIDE,
    Tuned,
    by_diffusers,
    distance,
    exported,
    forward,
    run,
    tuned,
)
from qzo_diffusion.quant.branched import BranchedLinear
from tests.small_models import sd3_transformer
from tests.small_pipeline import write_pipeline

PACKAGE = "sdnq"
MISSING = f"no package {PACKAGE} here, which quantizes; `pip install --no-deps sdnq==0.2.8` adds it"
# relative: of fp32 in a dozen products one behind another, and of a branch that is stored in bf16
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2.0**-9}
PARTS = {"residual": "scale", "down": "svd_down"}


@dataclass(frozen=True)
class Kind:
    """What the package is told, and the dtype of the model that it quantizes."""

    weights: str
    branch: bool
    rotation: bool
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        more = ["branch"] * self.branch + ["rotation"] * self.rotation
        more += ["bf16"] * (self.dtype == torch.bfloat16)
        return ", ".join([self.weights, *more])


BOTH = (False, True)
MADE = [Kind(of, branch, turned) for of in ("uint4", "int8") for branch in BOTH for turned in BOTH]
KINDS = {str(one): one for one in (*MADE, Kind("uint4", True, True, torch.bfloat16))}


def of_package(images: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Figures by kind, each of an untrained run on captioned images and of one of `STEPS` steps."""
    figures = {}
    for name in names:
        with tempfile.TemporaryDirectory() as place:
            figures[name] = _compared(Path(place), KINDS[name], images)
        print(name, figures[name], flush=True)
    return figures


def is_here() -> bool:
    return find_spec(PACKAGE) is not None


def reader() -> str:
    return f"diffusers with {PACKAGE} {metadata.version(PACKAGE)}"


def _compared(folder: Path, kind: Kind, images: Path) -> dict[str, Any]:
    place = _quantized_pipeline(folder, kind)
    source = place / "transformer"
    base = tuned(untrained := run(folder, place, images, 0))
    ours, theirs = forward(base.model), by_diffusers(source)
    here = tuned(trained := run(folder, place, images, STEPS))
    same, changed = (exported(one, "native") for one in (untrained, trained))
    off = distance(forward(here.model), forward(by_diffusers(changed)))
    return {
        "roundtrip_identical": _identical(load_file(source / FILE), load_file(same / FILE)),
        "weights_off": _weights_off(base.model, theirs),
        "base_off": distance(ours, forward(theirs)),
        "forward_equal": off < ROUNDING[kind.dtype],
        "forward_off": off,
        "moved": distance(forward(here.model), ours),
        "change_kept": _change_kept(load_file(source / FILE), load_file(changed / FILE), here),
    }


def _quantized_pipeline(folder: Path, kind: Kind) -> Path:
    """A small random pipeline whose transformer the package quantized and saved."""
    from diffusers import SD3Transformer2DModel, SDNQConfig

    place = write_pipeline(folder / "pipeline")
    sd3_transformer(layers=2, width=WIDE).save_pretrained(folder / "plain")
    how = SDNQConfig(
        weights_dtype=kind.weights,
        use_svd=kind.branch,
        use_hadamard=kind.rotation,
        use_quantized_matmul=False,
    )
    model = SD3Transformer2DModel.from_pretrained(
        folder / "plain", quantization_config=how, torch_dtype=kind.dtype
    )
    model.save_pretrained(place / "transformer")
    return place


def _weights_off(ours: nn.Module, theirs: nn.Module) -> float:
    """The largest relative distance of a layer's weight."""
    layers = {name: one for name, one in ours.named_modules() if isinstance(one, BranchedLinear)}
    plain: Any = {name: theirs.get_submodule(name) for name in layers}
    return max(
        distance(one.dequantized(), plain[name].dequantize().weight.detach().float())
        for name, one in layers.items()
    )


def _identical(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> bool:
    """Whether all tensors have the same names, dtypes and bytes."""
    return before.keys() == after.keys() and all(
        before[name].dtype == after[name].dtype and torch.equal(before[name], after[name])
        for name in before
    )


def _change_kept(before: Mapping[str, Tensor], after: Mapping[str, Tensor], run: Tuned) -> float:
    """Σ c·k / Σ c·c of changes c = log(tuned / base), where the file holds k."""
    kept = whole = 0.0
    for name, base in run.base.items():
        layer, _, part = name.rpartition(".")
        file = f"{layer}.{PARTS[part]}"
        wanted = (run.scales[name] / base).double().log()
        old, new = before[file].double(), after[file].double()
        found = torch.where(old == 0, 1.0, new / old).log().view(*wanted.shape, -1).mean(-1)
        kept += float((wanted * found).sum())
        whole += float(wanted.square().sum())
    return round(kept / whole, 4)
