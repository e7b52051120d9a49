"""Generate images from encoded prompts with equal seeds, and lay them out as grids."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from qzo_diffusion.diffusion.decoding import decoded
from qzo_diffusion.diffusion.encoded_prompt import EncodedPrompt
from qzo_diffusion.diffusion.families.family import Family
from qzo_diffusion.diffusion.images import open_image
from qzo_diffusion.system.files import write_whole
from qzo_diffusion.system.progress import Progress

LABEL_HEIGHT = 16
# pixels; grids enlarge smaller images by whole factors, so that a person can see them
SMALLEST_CELL = 128


class Sampler:
    """Draw images of fixed prompts and seeds with the transformer as it is when called.

    Args:
        family: that the model is of.
        transformer, scheduler, vae: parts of its pipeline. The VAE needs only its decoder.
        prompts: encoded prompts; prompt i always has the seed `seed + i`.
        negatives: the encoded negative prompt of each prompt, needed for guidance above 1.
        width, height: size of the images in pixels.
    """

    def __init__(
        self,
        family: Family,
        transformer: Any,
        scheduler: Any,
        vae: Any,
        prompts: Sequence[EncodedPrompt],
        negatives: Sequence[EncodedPrompt],
        *,
        width: int,
        height: int,
        steps: int,
        guidance: float,
        seed: int,
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._family = family.sampling
        self._pipeline = self._family.pipeline(transformer, scheduler, vae)
        self._pipeline.set_progress_bar_config(disable=True)
        self._vae, self._prompts, self._negatives = vae, list(prompts), list(negatives)
        self._size = {"height": height, "width": width}
        self._settings = {"num_inference_steps": steps, self._family.guidance_argument: guidance}
        self._seed, self._batch_size, self.device, self._dtype = seed, batch_size, device, dtype

    def images(self) -> list[Image.Image]:
        """Return one RGB image for each prompt."""
        images: list[Image.Image] = []
        with Progress(total=len(self._prompts), desc="sample", unit="image", leave=False) as bar:
            for start in self.starts:
                images += [self.decode(latents) for latents in self.latents(start)]
                bar.update(len(images) - start)
        return images

    @property
    def starts(self) -> range:
        """The first prompt of each batch of images."""
        return range(0, len(self._prompts), self._batch_size)

    @torch.no_grad()
    def latents(self, start: int) -> Tensor:
        """Draw the latents [B, C, h, w] of the batch that begins with this prompt."""
        chosen = self._prompts[start : start + self._batch_size]
        negatives = self._negatives[start : start + self._batch_size]
        encoded = {
            name: self._moved(given)
            for name, given in self._family.arguments(chosen, negatives).items()
        }
        seeds = range(self._seed + start, self._seed + start + len(chosen))
        drawn = self._pipeline(
            **encoded,
            # drawn on the CPU, so that every device has the same noise
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="latent",
            **self._size,
            **self._settings,
        ).images
        return self._family.unpacked(self._pipeline, drawn, *self._size.values())

    def _moved(self, given: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        if isinstance(given, list):
            return [one.to(self.device, self._dtype) for one in given]
        return given.to(self.device, self._dtype)

    def decode(self, latents: Tensor) -> Image.Image:
        """Return the RGB image of latents [C, h, w]."""
        return decoded(self._vae, latents.unsqueeze(0))[0]


def grid(columns: Sequence[Sequence[Image.Image]], titles: Sequence[str]) -> Image.Image:
    """Lay out images as columns of equal length under a line of titles; rows are prompts."""
    from diffusers.utils import make_image_grid

    first = columns[0][0]
    factor = max(1, -(-SMALLEST_CELL // min(first.size)))
    width, height = first.width * factor, first.height * factor
    rows = [
        column[row].resize((width, height), Image.Resampling.NEAREST)
        for row in range(len(columns[0]))
        for column in columns
    ]
    body = make_image_grid(rows, rows=len(columns[0]), cols=len(columns))
    labelled = Image.new("RGB", (body.width, body.height + LABEL_HEIGHT), "white")
    labelled.paste(body, (0, LABEL_HEIGHT))
    draw = ImageDraw.Draw(labelled)
    for index, title in enumerate(titles):
        draw.text((index * width + 4, 2), title, fill="black")
    return labelled


def cells(column: Image.Image, rows: int) -> list[Image.Image]:
    """Return the images of a grid of one column, at the size they have in the grid.

    Raises:
        ValueError: the grid has another number of rows.
    """
    height, rest = divmod(column.height - LABEL_HEIGHT, rows)
    if rest or height < 1:
        raise ValueError(f"{column.height - LABEL_HEIGHT} pixels of pictures are not {rows} rows")
    tops = range(LABEL_HEIGHT, column.height, height)
    return [column.crop((0, top, column.width, top + height)) for top in tops]


def join_columns(columns: Sequence[Image.Image]) -> Image.Image:
    """Put grids of one column each side by side."""
    joined = Image.new(
        "RGB",
        (sum(column.width for column in columns), max(column.height for column in columns)),
        "white",
    )
    left = 0
    for column in columns:
        joined.paste(column, (left, 0))
        left += column.width
    return joined


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG atomically: the file is there as a whole or not at all."""
    data = io.BytesIO()
    picture.save(data, format="PNG")
    write_whole(path, data.getvalue())


def load_picture(path: Path) -> Image.Image:
    """Read a picture that a run wrote.

    Raises:
        DataError: it is damaged or too large.
    """
    return open_image(path).image


def mean_chroma(images: Sequence[Image.Image]) -> float:
    """Return the mean of (largest - smallest channel) over all pixels, in [0, 1].

    That is HSV saturation times value, and agrees with the colour that a person sees. HSV
    saturation alone calls a nearly black pixel with a tint fully saturated.
    """
    spans = []
    for image in images:
        pixels = (
            torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
            .view(-1, 3)
            .float()
        )
        spans.append((pixels.amax(1) - pixels.amin(1)).mean())
    return float(torch.stack(spans).mean() / 255)


def mean_saturation(images: Sequence[Image.Image]) -> float:
    """Return the mean HSV saturation over all pixels of all images, in [0, 1]."""
    saturation = [
        torch.frombuffer(bytearray(i.convert("HSV").tobytes()), dtype=torch.uint8)[1::3]
        .float()
        .mean()
        for i in images
    ]
    return float(torch.stack(saturation).mean() / 255)
