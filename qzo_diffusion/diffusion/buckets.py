"""Aspect-ratio buckets. Images keep about their own proportions: each goes to the nearest of nine
shapes of equal area.

A batch is a single tensor, so all its samples share a shape (`train.batch_plan`).
"""

import functools
import math
from collections.abc import Mapping

from qzo_diffusion.core.errors import ConfigError

Bucket = tuple[int, int]
"""(width, height) in pixels, both multiples of 16: the VAE shrinks by 8 and the transformer takes
patches of 2.
"""

STRIDE = 16
_WIDE_SHAPES_AT_1024 = ((1152, 896), (1216, 832), (1344, 768), (1472, 704))
# At low resolutions rounding to 16 bends some shapes far from the area asked for; those are left
# out.
_AREA_TOLERANCE = 0.25


@functools.cache
def bucket_shapes(resolution: int) -> tuple[Bucket, ...]:
    """The shapes for a resolution, the square first; at 1024 those that Stable Diffusion 3.5 was
    trained on.

    Raises:
        ConfigError: the resolution is below 16.
    """
    if resolution < STRIDE:
        raise ConfigError(
            f"a resolution of {resolution}", f"at least {STRIDE} pixels", "raise data.resolution"
        )
    square = _rounded(resolution)
    shapes = [(square, square)]
    for width_at_1024, height_at_1024 in _WIDE_SHAPES_AT_1024:
        width, height = (
            _rounded(width_at_1024 * resolution / 1024),
            _rounded(height_at_1024 * resolution / 1024),
        )
        if abs(width * height / square**2 - 1) <= _AREA_TOLERANCE:
            shapes += [(width, height), (height, width)]
    return tuple(dict.fromkeys(shapes))


def nearest_bucket(width: int, height: int, resolution: int) -> Bucket:
    """The shape whose proportions are nearest to width : height, by their ratio. No image is
    refused.

    Raises:
        ConfigError: as `bucket_shapes`.
    """
    aspect = math.log(width / height)
    return min(
        bucket_shapes(resolution), key=lambda shape: abs(aspect - math.log(shape[0] / shape[1]))
    )


def part_to_cover(size: tuple[int, int], bucket: Bucket) -> tuple[int, int]:
    """The largest part of an image of `size` that has the proportions of a bucket, in its own
    pixels.
    """
    (image_width, image_height), (width, height) = size, bucket
    scale = min(image_width / width, image_height / height)
    return (
        min(image_width, max(1, round(width * scale))),
        min(image_height, max(1, round(height * scale))),
    )


def losses(size: tuple[int, int], bucket: Bucket) -> tuple[float, float]:
    """(which part of an image of `size` is cut off, how many times larger the rest becomes)."""
    width, height = part_to_cover(size, bucket)
    return 1 - width * height / (size[0] * size[1]), bucket[0] / width


def check_positions(shapes: Mapping[str, Bucket], most: int) -> None:
    """Raise ConfigError for a shape beyond the transformer's table of positions.

    Args:
        shapes: by a word for what has it, such as the name of an image.
        most: pixels of a side for which the table has positions.
    """
    beyond = {name: shape for name, shape in shapes.items() if max(shape) > most}
    if beyond:
        name, (width, height) = max(beyond.items(), key=lambda pair: max(pair[1]))
        fitting = largest_resolution(most)
        raise ConfigError(
            f"{width}x{height} pixels for {name} ({len(beyond)} of {len(shapes)} are too large)",
            f"at most {most} pixels a side, which the model has positions for",
            f"use data.resolution={fitting} or less: then every shape fits",
        )


def largest_resolution(most: int) -> int:
    """The largest resolution of which no bucket is wider or higher than `most` pixels."""
    fitting = STRIDE
    while max(map(max, bucket_shapes(fitting + STRIDE))) <= most:
        fitting += STRIDE
    return fitting


def _rounded(pixels: float) -> int:
    return max(STRIDE, round(pixels / STRIDE) * STRIDE)
