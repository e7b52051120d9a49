"""Decode a file of unknown origin to RGB pixels, or give the reason why that is not possible.

Everything in a user's folder is either converted, with a note on the conversion, or refused as a
`BadImage` with a reason. Sizes are checked in the header before any pixel is decoded, so a
decompression bomb costs nothing.
"""

import contextlib
import warnings
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError, features

from qzo_diffusion.core.errors import DataError
from qzo_diffusion.diffusion.colour import Convert, by_strips, to_srgb
from qzo_diffusion.diffusion.image_metadata import without_metadata

# Formats are named because Pillow would otherwise try all that it knows. Some of those start other
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
# Pictures in formats that are not read. To skip them like other files would lose them silently.
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


# A mode -> the mode that has the same colours; RGB for all others.
_PLAIN_MODES = {
    **dict.fromkeys(("1", "L", "LA", "La", "I;16"), "L"),
    **{mode: mode for mode in ("CMYK", "LAB")},
}
# A header may claim so many bytes in any file, ...
_FREE_BYTES = 100_000_000
_COMPRESSION = 200  # ... and so many bytes of pixels for each byte of the file
_BYTES_PER_PIXEL = 4  # in Pillow's memory, also of RGB
_LARGEST_TILE = 2**24  # pixels
_TILE_WIDTH, _TILE_LENGTH, _ROWS_PER_STRIP = 322, 323, 278  # tags of TIFF
_JPEG_SCAN, _MOST_SCANS = b"\xff\xda", 1000


class BadImage(DataError):
    """One file that cannot be trained on; `reason` gives the cause in a few words, without the
    path.
    """

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
    """The picture in RGB and upright; `notes` name the conversions that were needed. `alpha` is its
    alpha channel in grey, if it was asked for and is not white throughout.
    """

    image: Image.Image
    notes: tuple[str, ...]
    alpha: Image.Image | None = None


def is_image_name(path: Path) -> bool:
    """Return whether a name ends like a picture's, also in formats that are not read.

    `open_image` judges the content.
    """
    return path.suffix.lower() in IMAGE_SUFFIXES | UNREAD_SUFFIXES


def open_image(path: Path, with_alpha: bool = False) -> OpenedImage:
    """Decode a file to RGB.

    The picture is turned as EXIF says, converted to sRGB, and laid over white where it is
    transparent. An animation gives its first frame.

    Raises:
        BadImage: not an image, damaged, too small, or too large to be decoded safely.
    """
    if not path.is_file():
        raise BadImage("not a regular file, or a link to nothing", path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            opened = _decoded(path, path, with_alpha)
        except BadImage:
            raise
        except Exception as error:
            # Decoders of damaged bytes raise nearly everything: struct.error, IndexError, ...
            opened = _without_metadata(path, error, with_alpha)
    more = [str(item.message) for item in caught if issubclass(item.category, UserWarning)]
    return replace(opened, notes=tuple(dict.fromkeys([*opened.notes, *more])))


def _decoded(source: Path | BytesIO, path: Path, with_alpha: bool) -> OpenedImage:
    frames = _note_on_frames(source)
    with Image.open(source, formats=tuple(_FORMATS)) as image:
        _check_size(image, path)
        notes = [*frames, *_notes_from_header(image)]
        rotated = _note_rotation(image, notes)
        image.load()
        # Ask again: Pillow turns TIFFs by itself in `load`, and then drops the tag.
        turn = _turn(image) if rotated else None
        alpha = _alpha(image) if with_alpha else None
        parts = [_to_rgb(image, path, notes), *([] if alpha is None else [alpha])]
    upright = parts if turn is None else [part.transpose(turn) for part in parts]
    return OpenedImage(upright[0], tuple(notes), *upright[1:])


def _without_metadata(path: Path, error: Exception, with_alpha: bool) -> OpenedImage:
    """Decode once more without texts, profiles and tags, so that a fault in them costs nothing."""
    for stripped in without_metadata(path):
        with contextlib.suppress(Exception):
            opened = _decoded(BytesIO(stripped), path, with_alpha)
            reason = f"metadata unreadable and left out ({type(error).__name__})"
            return replace(opened, notes=(reason, *opened.notes))
    raise BadImage(_reason(path, error), path) from error


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"too large to decode: {error}"
    if unread := _unread_format(path):
        return unread
    if path.stat().st_size == 0:
        return "an empty file (0 bytes)"
    if isinstance(error, UnidentifiedImageError):
        return "not an image, by its content"
    return f"damaged or truncated ({type(error).__name__}: {error})"


def _check_size(image: Image.Image, path: Path) -> None:
    size, pixels = f"{image.width}x{image.height} pixels", image.width * image.height
    if pixels > MAX_PIXELS:
        raise BadImage(f"too large to decode: {size}, at most {MAX_PIXELS} in all", path)
    if min(image.size) < MIN_SIDE:
        raise BadImage(f"too small: {size}, the shorter side must have at least {MIN_SIDE}", path)
    length = path.stat().st_size
    if _BYTES_PER_PIXEL * pixels > _FREE_BYTES + _COMPRESSION * length:
        raise BadImage(f"too large to decode: {size} in a file of {length} bytes", path)
    _check_blocks(image, path)
    if image.format in ("JPEG", "MPO") and path.read_bytes().count(_JPEG_SCAN) > _MOST_SCANS:
        raise BadImage(f"more than {_MOST_SCANS} scans, which would take hours", path)


def _check_blocks(image: Image.Image, path: Path) -> None:
    """Refuse a TIFF with huge tiles or strips: its decoder allocates as much as the tags claim."""
    tags = getattr(image, "tag_v2", {})
    width = tags.get(_TILE_WIDTH, image.width)
    height = tags.get(_TILE_LENGTH, min(tags.get(_ROWS_PER_STRIP, image.height), image.height))
    if width * height > max(2 * image.width * image.height, _LARGEST_TILE):
        raise BadImage(f"damaged: tiles of {width}x{height} pixels", path)


def _note_on_frames(source: Path | BytesIO) -> list[str]:
    """Note how many frames are dropped.

    They are counted in a second image: counting reads all frames, and later ones may be damaged.
    """
    try:
        with Image.open(source, formats=tuple(_FORMATS)) as image:
            frames = getattr(image, "n_frames", 1)
    except Exception:  # As in open_image.
        return ["the first of an unknown number of frames"]
    return [f"first of {frames} frames"] if frames > 1 else []


def _notes_from_header(image: Image.Image) -> list[str]:
    notes = []
    # Pillow reduces 16-bit colour to 8 bits by itself. Only the raw mode of the undecoded tiles
    # shows it.
    if image.mode in ("RGB", "RGBA", "LA") and any(
        ";16" in str(tile) for tile in getattr(image, "tile", ())
    ):
        notes.append("converted from 16 bits a channel")
    if "icc_profile" not in image.info and _is_adobe_rgb(image):
        notes.append("Adobe RGB by its EXIF data, without a profile; taken as sRGB")
    gamma = image.info.get("gamma")
    if {"icc_profile", "srgb"}.isdisjoint(image.info) and gamma and abs(gamma - 1 / 2.2) > 0.05:
        notes.append(f"a gamma of {gamma:.3g} in its header is not applied")
    return notes


def _is_adobe_rgb(image: Image.Image) -> bool:
    with contextlib.suppress(Exception):  # As in open_image: a parser of damaged bytes.
        return image.getexif().get_ifd(ExifTags.IFD.Interop).get(1) == "R03"
    return False


def _note_rotation(image: Image.Image, notes: list[str]) -> bool:
    """Return whether the file asks to be turned, and note it.

    Damaged EXIF data is noted and costs no picture.
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
    """Return the rotation that makes the picture upright, as Pillow holds it now."""
    return _TURNS.get(image.getexif().get(_EXIF_ORIENTATION, 1))


def _unread_format(path: Path) -> str | None:
    suffix = path.suffix.lower()
    return (
        f"{suffix} is a format that is not read; convert it to PNG or JPEG"
        if suffix in UNREAD_SUFFIXES
        else None
    )


def _to_rgb(image: Image.Image, path: Path, notes: list[str]) -> Image.Image:
    if image.mode in ("I", "F"):
        # 32-bit samples have no agreed white, so any scale would be a guess.
        raise BadImage(
            f"32-bit samples (mode {image.mode}); save it with 8 or 16 bits a channel", path
        )
    profile, clear = image.info.get("icc_profile") or None, image.has_transparency_data
    if image.mode.startswith("I;16"):
        notes.append("converted from 16-bit grey")
    elif image.mode != "RGB" or clear:
        guess = " without a colour profile" if image.mode == "CMYK" and profile is None else ""
        notes.append(f"converted from {_NAMES.get(image.mode, image.mode)}{guess}")
    mode = _PLAIN_MODES.get(image.mode[:4], "RGB")
    convert = to_srgb(mode, profile, notes)
    if convert is None and image.mode == "RGB" and not clear:
        return image
    convert = convert or (lambda strip: strip)
    if not clear:
        return by_strips(image, lambda strip: convert(_as_plain(strip, mode)))
    least = [255]
    rgb = by_strips(image, lambda strip: _over_white(strip, mode, convert, least))
    if min(least) < 255:
        notes.append("transparent parts laid over white")
    return rgb


def _alpha(image: Image.Image) -> Image.Image | None:
    if not image.has_transparency_data:
        return None
    alpha = _to_rgba(image).getchannel("A")
    return alpha if int(np.asarray(alpha).min()) < 255 else None


def _as_plain(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I;16"):
        return _from_16_bit(image)
    if image.mode == "La":
        image = image.convert("LA")
    return image if image.mode == mode else image.convert(mode)


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Scale 0..65535 to 0..255, rounded to nearest.

    Pillow's own conversion clips at 255 and leaves a white picture.
    """
    values = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _to_rgba(image: Image.Image) -> Image.Image:
    return (image.convert("LA") if image.mode == "La" else image).convert("RGBA")


def _over_white(image: Image.Image, mode: str, convert: Convert, least: list[int]) -> Image.Image:
    """Convert colours to sRGB, then lay them over white, as browsers do. `least` receives the
    smallest alpha.
    """
    rgba = _to_rgba(image)
    alpha = rgba.getchannel("A")
    least.append(int(np.asarray(alpha).min()))
    white = Image.new("RGB", image.size, "white")
    white.paste(convert(rgba.convert("RGB").convert(mode)), mask=alpha)
    return white
