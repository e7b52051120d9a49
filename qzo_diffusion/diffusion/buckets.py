"""Aspect-ratio buckets: each image is cut to the nearest of nine shapes of equal area, so that it
keeps about its own proportions.

A batch is a single tensor, so all its samples share a shape (`train.batch_plan`).
"""

import functools
import math
from collections.abc import Mapping

from qzo_diffusion.core.errors import ConfigError

Bucket = tuple[int, int]
"""(width, height) in pixels. Both are multiples of 16: the VAE shrinks by 8, and the transformer
takes patches of 2.
"""

STRIDE = 16
_WIDE_SHAPES_AT_1024 = ((1152, 896), (1216, 832), (1344, 768), (1472, 704))
# At low resolutions rounding to 16 moves some shapes far from the requested area. They are left
# out.
_AREA_TOLERANCE = 0.25


@functools.cache
def bucket_shapes(resolution: int) -> tuple[Bucket, ...]:
    """Return the shapes for a resolution, the square first.

    At 1024 they are those that Stable Diffusion 3.5 was trained on.

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
    """Return the shape whose ratio of width to height is nearest to that of an image in pixels.

    No image is refused.

    Raises:
        ConfigError: as `bucket_shapes`.
    """
    aspect = math.log(width / height)
    return min(
        bucket_shapes(resolution), key=lambda shape: abs(aspect - math.log(shape[0] / shape[1]))
    )


def part_to_cover(size: tuple[int, int], bucket: Bucket) -> tuple[int, int]:
    """Return (width, height) in pixels of the largest part of an image that has a bucket's
    proportions.
    """
    (image_width, image_height), (width, height) = size, bucket
    scale = min(image_width / width, image_height / height)
    return (
        min(image_width, max(1, round(width * scale))),
        min(image_height, max(1, round(height * scale))),
    )


def losses(size: tuple[int, int], bucket: Bucket) -> tuple[float, float]:
    """Return the fraction of an image that is cut off, and the factor by which the rest is
    enlarged.
    """
    width, height = part_to_cover(size, bucket)
    return 1 - width * height / (size[0] * size[1]), bucket[0] / width


def check_positions(shapes: Mapping[str, Bucket], most: int) -> None:
    """Check that the transformer has positions for every shape.

    Args:
        shapes: what each shape belongs to, such as the name of an image -> the shape.
        most: the largest side in pixels that the transformer has positions for.

    Raises:
        ConfigError: a shape is too large.
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
    """Return the largest resolution of which no bucket has a side above `most` pixels."""
    fitting = STRIDE
    while max(map(max, bucket_shapes(fitting + STRIDE))) <= most:
        fitting += STRIDE
    return fitting


def _rounded(pixels: float) -> int:
    return max(STRIDE, round(pixels / STRIDE) * STRIDE)
