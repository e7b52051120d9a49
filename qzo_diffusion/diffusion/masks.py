"""Masks of images: which parts count in the loss.

A mask is grey: white counts, black does not, and grey counts in part. It is the file NAME_mask.png
beside a picture, or the picture's own alpha channel. Where it is black the picture is made white
before anything reads it, so that what was there changes no bit of a latent, of a hash or of a loss.
"""

import hashlib
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from qzo_diffusion.diffusion.images import BadImage, OpenedImage, open_image
from qzo_diffusion.diffusion.pixels import cut_to_cover
from qzo_diffusion.diffusion.sample import Sample

MaskKind = Literal["alpha", "file", "none"]


def mask_file(path: Path) -> Path:
    """The file that holds the mask of a picture, if there is one."""
    return path.with_name(f"{path.stem}_mask.png")


def open_masked(path: Path, kind: MaskKind) -> tuple[OpenedImage, Image.Image | None]:
    """Open a picture with its mask, which is grey and of its size; None where it has none.

    Raises:
        BadImage: as `open_image`; or the mask can't be read, has another size, or is all black.
    """
    opened = open_image(path, with_alpha=kind == "alpha")
    mask = opened.alpha
    if kind == "file" and mask_file(path).is_file():
        mask = _grey(mask_file(path), path)
    if mask is None:
        return opened, None
    if mask.size != opened.image.size:
        sizes = [f"{one.width}x{one.height}" for one in (mask, opened.image)]
        raise BadImage(f"its mask has {sizes[0]} pixels, the picture {sizes[1]}", path)
    if not mask.getextrema()[1]:
        raise BadImage("its mask hides all of it", path)
    white = Image.new("RGB", mask.size, "white")
    shown = mask.point(lambda value: 255 if value else 0)
    image = Image.composite(opened.image, white, shown)
    return OpenedImage(image, opened.notes, mask), mask


def _grey(file: Path, path: Path) -> Image.Image:
    try:
        return open_image(file).image.convert("L")
    except BadImage as error:
        raise BadImage(f"its mask {file.name}: {error.reason}", path) from None


def visible_image(sample: Sample) -> Image.Image:
    """The picture of a sample without what its mask hides. Raises BadImage."""
    return open_masked(sample.path, sample.mask)[0].image


def hash_of_visible(image: Image.Image, mask: Image.Image) -> str:
    """A hash of a picture and its mask that does not depend on what the mask hides."""
    digest = hashlib.sha256(f"masked {image.width}x{image.height}".encode())
    digest.update(image.tobytes())
    digest.update(mask.tobytes())
    return digest.hexdigest()


def weights_of(mask: Image.Image, sample: Sample, flip: bool, latents: Tensor) -> Tensor:
    """How much each latent counts: fp32 [1, h, w] in [0, 1], the mean of the mask over its place.

    Args:
        latents: of the picture, [..., h, w].
    """
    whole = functional.pil_to_tensor(mask)
    cut = cut_to_cover(whole, (sample.width, sample.height))
    height, width = latents.shape[-2:]
    found = F.adaptive_avg_pool2d(cut.float().div(255), (height, width))
    return torch.as_tensor(found.flip(-1) if flip else found)
