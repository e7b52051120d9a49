"""Small files of every kind that a folder from the wild holds, built in place."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from qzo_diffusion.diffusion.images import open_image
from qzo_diffusion.diffusion.pixels import to_pixels

BLUE = (20, 40, 200)


def save(
    path: Path, *, size: tuple[int, int] = (32, 32), colour: tuple[int, int, int] = BLUE
) -> Path:
    """A plain RGB image; distinct colours give distinct bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def load_pixels(path: Path, width: int, height: int, flip: bool) -> torch.Tensor:
    """A file as the encoder of images gets it."""
    return to_pixels(open_image(path).image, width, height, flip)


def save_many(folder: Path, count: int, *, text: str | None = "a cat") -> list[Path]:
    """`count` different images 000.png, 001.png, ...

    each with a .txt beside it, unless `text` is None.
    """
    paths = []
    for index in range(count):
        paths.append(save(folder / f"{index:03}.png", colour=(index % 256, index // 256, 7)))
        if text is not None:
            paths[-1].with_suffix(".txt").write_text(text)
    return paths


def save_noise(path: Path, *, size: tuple[int, int] = (64, 64)) -> Path:
    """An image that does not compress, so that its pixel data can be cut off."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def save_truncated(path: Path) -> Path:
    data = save_noise(path).read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


def save_bomb(path: Path, side: int = 30_000) -> Path:
    """A PNG of a few hundred bytes whose header promises side x side RGB pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + _chunk(b"IDAT", zlib.compress(bytes(1000)))
        + _chunk(b"IEND", b"")
    )
    return path


def save_png_16_bit_rgb(path: Path, value: int, *, side: int = 16) -> Path:
    """Three channels of 16 bits, which Pillow can read but not write."""
    header = struct.pack(">IIBBBBB", side, side, 16, 2, 0, 0, 0)
    rows = (b"\x00" + struct.pack(">H", value) * 3 * side) * side
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + _chunk(b"IDAT", zlib.compress(rows))
        + _chunk(b"IEND", b"")
    )
    return path


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def saved(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path
