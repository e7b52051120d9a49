"""Rewards that need no model, on orderings that are known."""

import io
import math
import random

import pytest
from PIL import Image

from qzo_diffusion.rewards.of_pixels import (
    brightness,
    colourfulness,
    compressibility,
    incompressibility,
    jpeg_bytes,
)

SIDE = 64


def plain(colour):
    return Image.new("RGB", (SIDE, SIDE), colour)


def stripes(width):
    picture = plain("white")
    for left in range(0, SIDE, 2 * width):
        picture.paste("black", (left, 0, left + width, SIDE))
    return picture


def noise():
    bits = random.Random(0)
    return Image.frombytes("RGB", (SIDE, SIDE), bits.randbytes(3 * SIDE * SIDE))


def scores(reward, *pictures):
    return reward(pictures, [""] * len(pictures))


def test_the_busier_a_picture_the_more_bytes():
    found = [jpeg_bytes(one) for one in (plain("white"), stripes(16), stripes(4), noise())]
    assert found == sorted(found)
    assert len(set(found)) == len(found)


def test_headers_and_tables_do_not_count():
    """A plain picture is next to nothing; its file is not. More of the same is in proportion."""
    buffer = io.BytesIO()
    plain("white").save(buffer, format="JPEG", quality=95)
    assert jpeg_bytes(plain("white")) < 100 < 600 < len(buffer.getvalue())
    wide = Image.new("RGB", (4 * SIDE, SIDE))
    for at in range(4):
        wide.paste(noise(), (at * SIDE, 0))
    assert jpeg_bytes(wide) == pytest.approx(4 * jpeg_bytes(noise()), rel=0.01)


def test_compressibility_is_minus_the_logarithm():
    pictures = (plain("white"), noise())
    low, high = scores(incompressibility, *pictures)
    assert scores(compressibility, *pictures) == [-low, -high]
    assert math.exp(high - low) == pytest.approx(jpeg_bytes(noise()) / jpeg_bytes(plain("white")))


def test_the_more_colours_the_more_colourful():
    faded = Image.blend(noise(), plain("grey"), 0.5)
    grey, half, whole = scores(colourfulness, stripes(4), faded, noise())
    assert grey == pytest.approx(0, abs=1e-9)
    assert grey < half < whole
    assert half == pytest.approx(whole / 2, rel=0.05)


def test_brightness_is_luma():
    black, blue, green, white = scores(brightness, *map(plain, ("black", "blue", "lime", "white")))
    assert (black, white) == (0, 1)
    assert (blue, green) == pytest.approx((0.114, 0.587))
