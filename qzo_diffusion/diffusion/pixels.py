"""Turn an opened image into the pixels of its bucket."""

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from qzo_diffusion.diffusion.buckets import part_to_cover


def to_pixels(image: Image.Image, width: int, height: int, flip: bool) -> torch.Tensor:
    """Return an image in RGB as float32 [3, height, width] in [-1, 1].

    The image covers the given size and is cut at its centre.
    """
    # Cut first, then resize: the picture differs by half a source pixel at most, and a strip of
    # 20,000 x 16 stays small.
    pixels = functional.resize(
        cut_to_cover(functional.pil_to_tensor(image), (width, height)),
        [height, width],
        InterpolationMode.BICUBIC,
        antialias=True,
    )
    if flip:
        pixels = functional.horizontal_flip(pixels)
    return torch.as_tensor(pixels, dtype=torch.float32).div_(127.5).sub_(1.0)


def cut_to_cover(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return the part of pixels [..., H, W] about the centre that a size (width, height) shows."""
    height, width = pixels.shape[-2:]
    cut_width, cut_height = part_to_cover((width, height), size)
    top, left = (height - cut_height) // 2, (width - cut_width) // 2
    return pixels[..., top : top + cut_height, left : left + cut_width]
