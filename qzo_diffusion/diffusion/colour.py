"""Convert the colours of a file to sRGB, which the VAE was trained on.

A file may hold a colour profile that is wrong. Such a profile is ignored, and the image is kept.
"""

import functools
import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageCms

_LARGEST_PROFILE = 2**24  # bytes
_INVISIBLE = 2  # levels of 255; rounding alone gives 1
_STRIP = 2**22  # pixels that are converted at a time
_SPACES = {"RGB": "RGB", "CMYK": "CMYK", "L": "GRAY", "LAB": "Lab"}
_UNUSABLE = (ImageCms.PyCMSError, OSError, ValueError, TypeError)

Convert = Callable[[Image.Image], Image.Image]


def to_srgb(mode: str, profile: bytes | None, notes: list[str]) -> Convert | None:
    """Return a function that converts images of a mode (RGB, L, CMYK or LAB) to sRGB.

    Return None for images that are RGB already. `notes` receives a note on each conversion, and the
    reason if `profile` can't be used.
    """
    plain = None if mode == "RGB" else _plain
    if mode == "LAB":
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    elif profile is None:
        return plain
    try:
        name, own, transform = _transform(mode, profile)
    except _UNUSABLE as error:
        reason = _printable(str(error)) or type(error).__name__
        notes.append(f"colour profile unusable, taken as sRGB ({reason})")
        return plain
    if own == "RGB" and _changes_nothing(transform):
        return plain
    notes.append(f"colours converted to sRGB from {name}")
    return lambda image: _applied(transform, image.convert(own) if image.mode != own else image)


def by_strips(image: Image.Image, convert: Convert) -> Image.Image:
    """Convert some rows at a time, so that only the source and the result are held whole."""
    rows = max(1, _STRIP // image.width)
    if rows >= image.height:
        return convert(image)
    result = Image.new("RGB", image.size)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(image.height, top + rows)))
        result.paste(convert(strip), (0, top))
    return result


def _plain(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


def _transform(mode: str, data: bytes) -> tuple[str, str, ImageCms.ImageCmsTransform]:
    """Return the profile's name, the mode that it is for, and its transform to sRGB."""
    if len(data) > _LARGEST_PROFILE:
        raise ValueError(f"{len(data)} bytes")
    profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
    space = profile.profile.xcolor_space.strip()
    if mode == "L" and space == "RGB":
        mode = "RGB"  # grey pixels with the profile of a screen
    if space != _SPACES[mode]:
        raise ValueError(f"a profile of {_printable(space)} for {_SPACES[mode]} pixels")
    transform = ImageCms.buildTransform(profile, _srgb(), mode, "RGB")
    return _printable(profile.profile.profile_description or "") or space, mode, transform


@functools.cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def _changes_nothing(transform: ImageCms.ImageCmsTransform) -> bool:
    """Return whether a transform leaves a cube of colours as it is.

    Most profiles in files are sRGB under one of many names.
    """
    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(27, 27, 3)
    after = np.asarray(_applied(transform, Image.fromarray(cube)))
    return bool(np.abs(after.astype(int) - cube).max() <= _INVISIBLE)


def _applied(transform: ImageCms.ImageCmsTransform, image: Image.Image) -> Image.Image:
    result = ImageCms.applyTransform(image, transform)
    if result is None:  # Pillow returns None only for a change in place
        raise ValueError("no picture")
    return result


def _printable(text: str) -> str:
    """Return a few printable characters of a text from a file."""
    shown = "".join(character for character in text if character.isprintable()).strip()
    return shown if len(shown) <= 60 else shown[:57] + "..."
