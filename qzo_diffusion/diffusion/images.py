"""From a file of unknown origin to RGB pixels, or a reason why not.

Everything that a folder from the wild holds is either converted, with a note that says so, or
refused as a `BadImage` with a reason. Sizes are judged from the header, before any pixel is
decoded, so a decompression bomb costs nothing."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError, features
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from qzo_diffusion.core.errors import DataError

# Formats are named because Pillow would otherwise try all it knows, and some of those start other
# programs.
_FORMATS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    **({"AVIF": (".avif",)} if "avif" in features.modules and features.check("avif") else {}),
}
IMAGE_SUFFIXES = frozenset(suffix for suffixes in _FORMATS.values() for suffix in suffixes)
# Pictures as well, in formats that are not read: to pass them over as other files would lose them
# unseen.
UNREAD_SUFFIXES = frozenset({".heic", ".heif", ".jp2", ".tga", ".jxl", ".avif"}) - IMAGE_SUFFIXES
MAX_PIXELS = 178_000_000
MIN_SIDE = 16

_EXIF_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_NAMES = {
    "1": "black and white",
    "L": "grey",
    "LA": "grey with alpha",
    "P": "palette",
    "PA": "palette with alpha",
    "RGB": "RGB with a transparent colour",
}


class BadImage(DataError):
    """One file that cannot be trained on; `reason` says why in a few words, without the path."""

    def __init__(self, reason: str, path: Path) -> None:
        self.reason, self.path = reason, path
        super().__init__(
            f"{path}: {reason}",
            f"an image of at least {MIN_SIDE} pixels a side that Pillow can read",
            "replace the file, or take it out of the folder",
        )

    def __reduce__(self) -> tuple[type["BadImage"], tuple[str, Path]]:
        return BadImage, (self.reason, self.path)


@dataclass(frozen=True)
class OpenedImage:
    """The picture in RGB and upright; `notes` say what had to be done to it."""

    image: Image.Image
    notes: tuple[str, ...]


def is_image_name(path: Path) -> bool:
    """Whether the name ends as a picture's does, formats that are not read included; `open_image`
    judges the content.
    """
    return path.suffix.lower() in IMAGE_SUFFIXES | UNREAD_SUFFIXES


def open_image(path: Path) -> OpenedImage:
    """Decode a file to RGB: EXIF rotation applied, transparency laid over white, the first frame of
    an animation.

    Raises:
        BadImage: not an image, damaged, too small, or too large to be decoded safely.
    """
    if not path.is_file():
        raise BadImage("not a regular file, or a link to nothing", path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with Image.open(path, formats=tuple(_FORMATS)) as image:
                _check_size(image, path)
                notes = _notes_from_header(image)
                rotated = _note_rotation(image, notes)
                image.load()
                # Asked again: Pillow turns TIFFs by itself in `load`, and then drops the tag, so
                # that none is left to do.
                turn = _turn(image) if rotated else None
                rgb = _to_rgb(image, path, notes)
        except BadImage:
            raise
        except Image.DecompressionBombError as error:
            raise BadImage(f"too large to decode: {error}", path) from error
        except UnidentifiedImageError as error:
            empty = "an empty file (0 bytes)" if path.stat().st_size == 0 else None
            raise BadImage(
                empty or _unread_format(path) or "not an image, by its content", path
            ) from error
        except Exception as error:
            # Decoders of damaged bytes raise nearly everything: struct.error, IndexError, ...
            reason = (
                _unread_format(path) or f"damaged or truncated ({type(error).__name__}: {error})"
            )
            raise BadImage(reason, path) from error
    if turn is not None:
        rgb = rgb.transpose(turn)
    notes += [str(item.message) for item in caught if issubclass(item.category, UserWarning)]
    return OpenedImage(rgb, tuple(notes))


def load_pixels(path: Path, width: int, height: int, flip: bool) -> torch.Tensor:
    """The image as float32 [3, height, width] in [-1, 1], covering the given size and cut at its
    centre.

    Raises:
        BadImage: as `open_image`.
    """
    image = open_image(path).image
    pixels = functional.pil_to_tensor(image)
    # Cut first, resize second: the same picture up to half a source pixel, but a 20,000 x 16 strip
    # stays small.
    cut_width, cut_height = _cover(image.width, image.height, width, height)
    top, left = (image.height - cut_height) // 2, (image.width - cut_width) // 2
    pixels = functional.resized_crop(
        pixels,
        top,
        left,
        cut_height,
        cut_width,
        [height, width],
        InterpolationMode.BICUBIC,
        antialias=True,
    )
    if flip:
        pixels = functional.horizontal_flip(pixels)
    return torch.as_tensor(pixels, dtype=torch.float32).div_(127.5).sub_(1.0)


def _cover(image_width: int, image_height: int, width: int, height: int) -> tuple[int, int]:
    """The largest part of an image that has the proportions width : height, in its own pixels."""
    scale = min(image_width / width, image_height / height)
    return (
        min(image_width, max(1, round(width * scale))),
        min(image_height, max(1, round(height * scale))),
    )


def _check_size(image: Image.Image, path: Path) -> None:
    size = f"{image.width}x{image.height} pixels"
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(f"too large to decode: {size}, at most {MAX_PIXELS} in all", path)
    if min(image.size) < MIN_SIDE:
        raise BadImage(f"too small: {size}, the shorter side must have at least {MIN_SIDE}", path)


def _notes_from_header(image: Image.Image) -> list[str]:
    notes = []
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        notes.append(f"first of {frames} frames")
    # Pillow reduces 16-bit colour to 8 bits by itself; only the raw mode of the undecoded tiles
    # still tells.
    if image.mode in ("RGB", "RGBA", "LA") and any(
        ";16" in str(tile) for tile in getattr(image, "tile", ())
    ):
        notes.append("converted from 16 bits a channel")
    return notes


def _note_rotation(image: Image.Image, notes: list[str]) -> bool:
    """Whether the file says that it must be turned.

    Damaged EXIF data is no reason to lose a picture.
    """
    try:
        rotated = _turn(image) is not None
    except Exception as error:  # As in open_image: a parser of damaged bytes.
        notes.append(f"EXIF data unreadable, rotation unknown ({type(error).__name__})")
        return False
    if rotated:
        notes.append("rotated as its EXIF data says")
    return rotated


def _turn(image: Image.Image) -> Image.Transpose | None:
    """How the picture, as Pillow holds it now, must be turned to stand upright."""
    return _TURNS.get(image.getexif().get(_EXIF_ORIENTATION, 1))


def _unread_format(path: Path) -> str | None:
    suffix = path.suffix.lower()
    return (
        f"{suffix} is a format that is not read; convert it to PNG or JPEG"
        if suffix in UNREAD_SUFFIXES
        else None
    )


def _to_rgb(image: Image.Image, path: Path, notes: list[str]) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image.copy()
    if image.mode in ("I", "F"):
        # 32-bit samples have no agreed white, so any scale would be a guess.
        raise BadImage(
            f"32-bit samples (mode {image.mode}); save it with 8 or 16 bits a channel", path
        )
    if image.mode.startswith("I;16"):
        notes.append("converted from 16-bit grey")
        return _from_16_bit(image)
    notes.append(f"converted from {_NAMES.get(image.mode, image.mode)}")
    if image.has_transparency_data:
        return _over_white(image.convert("RGBA"), notes)
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Scale 0..65535 to 0..255, to the nearest; Pillow's own conversion clips at 255 and leaves a
    white picture.
    """
    values = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")


def _over_white(rgba: Image.Image, notes: list[str]) -> Image.Image:
    least = np.asarray(rgba.getchannel("A")).min()
    if least < 255:
        notes.append("transparent parts laid over white")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")
