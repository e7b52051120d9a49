"""Pictures of the embedded model by several quantizers: `python -m benchmarks.quantizer_pictures`.

Equal prompts and seeds, by plain diffusers. It writes docs/images/quantizers.png, and to
results/quantizers.json how far pictures are from those of the model that is not quantized."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from PIL import Image
from torch import Tensor

from benchmarks.quantizers import FORMATS, quantized
from benchmarks.record import update_results
from benchmarks.tiny.quality import Sampling, draw
from qzo_diffusion import resources
from qzo_diffusion.diffusion.families.sd3 import SD3
from qzo_diffusion.diffusion.sampling import grid
from qzo_diffusion.quant.base import linears_to_quantize
from qzo_diffusion.quant.svdquant import input_peaks

FILE = Path(__file__).parents[1] / "docs" / "images" / "quantizers.png"
PROMPTS = [f"{name}, noto style" for name in ("red apple", "panda", "guitar", "rocket", "penguin")]
# the peaks of inputs are those of other pictures
CALIBRATION = [f"{name}, noto style" for name in ("pizza", "butterfly", "snowman", "sunflower")]
TITLES = {
    "nf4, blocks of 64": "NF4",
    "int4, W4A16": "int4",
    "svdquant, W4A16": "SVDQuant",
    "int4, W4A4": "int4, W4A4",
    "svdquant, W4A4": "SVDQuant, W4A4",
    "svdquant, W4A4, smoothed": "the same, smoothed",
}


@torch.no_grad()
def pictures() -> dict[str, Tensor]:
    """uint8 images [N, 3, 64, 64] of `PROMPTS` by title; the first are of 16 bits."""
    folder, skip = resources.tiny_model(), SD3.denoiser.skip

    def fresh() -> Any:
        return SD3Transformer2DModel.from_pretrained(folder / "transformer").eval()

    exact = fresh()
    layers = [name for name, _ in linears_to_quantize(exact, skip, 64)]
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, transformer=exact)
    peaks = input_peaks(exact, layers, lambda: draw(pipe, CALIBRATION, Sampling(), first_seed=100))
    found = {"not quantized": draw(pipe, PROMPTS, Sampling())}
    for name, title in TITLES.items():
        pipe.transformer = fresh()
        quantized(pipe.transformer, skip, FORMATS[name], peaks)
        found[title] = draw(pipe, PROMPTS, Sampling())
    return found


def sheet(found: Mapping[str, Tensor]) -> Image.Image:
    columns = [
        [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in images]
        for images in found.values()
    ]
    return grid(columns, list(found))


def distances(found: Mapping[str, Tensor]) -> dict[str, float]:
    """Root mean squared differences of pixels from 0 to 1, of all pictures together."""
    exact, *_ = (one.float() / 255 for one in found.values())
    return {
        name: round(float((found[title].float() / 255 - exact).square().mean().sqrt()), 4)
        for name, title in TITLES.items()
    }


def main() -> None:
    found = pictures()
    sheet(found).quantize(64).save(FILE, optimize=True)
    print(update_results("quantizers", "pictures", {"pictures": distances(found)}, {}))


if __name__ == "__main__":
    main()
