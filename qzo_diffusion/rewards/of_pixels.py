"""Rewards that need no model: the size of a picture as JPEG, its colours, its brightness."""

import io
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

QUALITY = 95  # of JPEG, as in DDPO (arXiv 2305.13301)
_START_OF_SCAN, _END_OF_IMAGE = b"\xff\xda", 2


def jpeg_bytes(picture: Image.Image) -> int:
    """Return the bytes of a picture's coefficients as JPEG, without headers and tables.

    At 64 pixels those are half of a file, and the same for every picture.
    """
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, format="JPEG", quality=QUALITY)
    data = buffer.getvalue()
    start = data.index(_START_OF_SCAN) + 2
    header = int.from_bytes(data[start : start + 2], "big")
    return len(data) - start - header - _END_OF_IMAGE


def incompressibility(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """Return the logarithm of the bytes: a difference of 0.1 is about 10 % of them."""
    return [math.log(jpeg_bytes(picture)) for picture in pictures]


def compressibility(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """Return minus the logarithm of the bytes: a difference of 0.1 is about 10 % of them."""
    return [-value for value in incompressibility(pictures, prompts)]


def colourfulness(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """Return the colourfulness of Hasler and Süsstrunk (2003) over 255; 0 for a grey picture."""
    return [_colourfulness(picture) for picture in pictures]


def _colourfulness(picture: Image.Image) -> float:
    red, green, blue = np.moveaxis(_pixels(picture), 2, 0)
    opponents = np.stack([red - green, (red + green) / 2 - blue])
    spread, mean = (np.linalg.norm(one((1, 2))) for one in (opponents.std, opponents.mean))
    return float(spread + 0.3 * mean) / 255


def brightness(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """Return the mean luma, from 0 for black to 1 for white."""
    luma = np.array([0.299, 0.587, 0.114])
    return [float((_pixels(picture) @ luma).mean()) / 255 for picture in pictures]


def _pixels(picture: Image.Image) -> NDArray[np.float64]:
    return np.asarray(picture.convert("RGB"), np.float64)
