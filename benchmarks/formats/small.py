"""Every type of block of a small GGUF file: read, changed, written, and read by diffusers."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qzo_diffusion.diffusion.transformer import empty_transformer, find_transformer
from qzo_diffusion.quant.gguf import FACTORS, GgufLinear, Rounding, to_nearest
from qzo_diffusion.quant.gguf_write import dithered, write_tuned
from qzo_diffusion.quant.stream import Quantization, fill_
from tests.gguf_pictures import write_gguf
from tests.small_models import sd3_inputs, sd3_transformer

ROWS, COLUMNS = 3e-3, 3e-3  # spread of the changes, as 200 steps of a default run leave them
# A factor and a product are rounded to fp16, 2^-10 in all, in a dozen products one behind another.
FORWARD = 12 * 2.0**-10


def small() -> dict[str, dict[str, Any]]:
    figures = {}
    for kind in FACTORS:
        with tempfile.TemporaryDirectory() as place:
            figures[kind] = of_type(Path(place), kind)
        print(kind, figures[kind], flush=True)
    return figures


def of_type(folder: Path, kind: str) -> dict[str, Any]:
    plain = sd3_transformer(layers=2, width=4)
    source = write_gguf(folder / "base.gguf", plain, kind)
    plain.save_config(folder / "config")
    found = find_transformer(source)
    model = empty_transformer(found.config)
    fill_(model, found.entries, Quantization(), dtype=torch.float32, device=torch.device("cpu"))
    layers = {name: one for name, one in model.named_modules() if isinstance(one, GgufLinear)}

    def written(name: str, rounding: Rounding = to_nearest) -> tuple[Path, dict[str, Any]]:
        parts = {
            name: (found.entries[f"{name}.weight"], layer, layer.scales)
            for name, layer in layers.items()
        }
        kept = write_tuned(source, folder / name, parts, rounding)
        return folder / name, kept.facts()

    identical = written("same.gguf")[0].read_bytes() == source.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for layer in layers.values():
        rows, columns = layer.scales.shape
        change = torch.randn(rows, 1, generator=generator) * ROWS
        layer.scales = layer.scales * torch.exp(
            change + torch.randn(1, columns, generator=generator) * COLUMNS
        )
    file, facts = written("nearest.gguf")
    theirs = forward(read_by_diffusers(file, folder / "config"), plain)
    wanted = forward(model, plain)
    off = float((theirs - wanted).norm() / wanted.norm())
    return {
        "roundtrip_identical": identical,
        "forward_equal": off < FORWARD,
        "forward_off": round(off, 6),
        **facts,
        "dithered": written("dithered.gguf", dithered)[1],
    }


def forward(model: nn.Module, plain: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**sd3_inputs(plain)).sample
    return result


def read_by_diffusers(file: Path, config: Path) -> nn.Module:
    from diffusers import GGUFQuantizationConfig, SD3Transformer2DModel

    model: nn.Module = SD3Transformer2DModel.from_single_file(
        str(file),
        config=str(config),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        dtype=torch.float32,
    )
    return model
