"""Images of every format and mode: opened upright, converted with a note, cut and scaled."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from qzo_diffusion.diffusion.images import (
    IMAGE_SUFFIXES,
    BadImage,
    OpenedImage,
    is_image_name,
    open_image,
)
from tests.diffusion.image_files import (
    BLUE,
    load_pixels,
    save,
    save_noise,
    save_png_16_bit_rgb,
    saved,
)


def pixel(path: Path, x: int = 0, y: int = 0) -> tuple[int, ...]:
    value = open_image(path).image.getpixel((x, y))
    assert isinstance(value, tuple)
    return value


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_every_format_opens_by_content_without_a_note(tmp_path: Path, suffix: str) -> None:
    opened = open_image(save(tmp_path / f"a{suffix.upper()}"))
    assert is_image_name(tmp_path / f"a{suffix.upper()}")
    assert (opened.image.mode, opened.image.size) == ("RGB", (32, 32))
    assert opened.notes == (("converted from palette",) if suffix == ".gif" else ())
    assert np.abs(np.asarray(opened.image)[0, 0].astype(int) - BLUE).max() <= 4


def test_the_suffixes_asked_for_are_there() -> None:
    assert {
        ".png",
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".webp",
        ".bmp",
        ".gif",
        ".tif",
        ".tiff",
    } <= IMAGE_SUFFIXES
    assert not is_image_name(Path("a.txt"))
    assert not is_image_name(Path("png"))


def save_turned(path: Path, orientation: int, **options: Any) -> Path:
    """Red in row 0 of what is stored and green in its column 0, with a tag that says where those
    belong.

    Stripes are 8 pixels wide, so that JPEG keeps them apart.
    """
    stored = np.full((40, 56, 3), 255, np.uint8)
    stored[:, :8] = (0, 255, 0)
    stored[:8, :] = (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(Image.fromarray(stored), path, exif=exif, **options)


def assert_upright(opened: OpenedImage, orientation: int) -> None:
    # From the EXIF standard: where the first row and the first column of what is stored lie in the
    # upright picture.
    red, green = {
        1: ("top", "left"),
        2: ("top", "right"),
        3: ("bottom", "right"),
        4: ("bottom", "left"),
        5: ("left", "top"),
        6: ("right", "top"),
        7: ("right", "bottom"),
        8: ("left", "bottom"),
    }[orientation]
    pixels = np.asarray(opened.image).astype(int)
    assert pixels.shape == ((40, 56, 3) if orientation < 5 else (56, 40, 3))
    edges = {
        "top": pixels[4, 12:-12],
        "bottom": pixels[-4, 12:-12],
        "left": pixels[12:-12, 4],
        "right": pixels[12:-12, -4],
    }
    assert np.abs(edges[red] - (255, 0, 0)).max() < 40
    assert np.abs(edges[green] - (0, 255, 0)).max() < 40
    assert opened.notes == (("rotated as its EXIF data says",) if orientation > 1 else ())


_TURNED = [
    ("a.png", {}),
    ("a.jpg", {"quality": 95, "subsampling": 0}),
    ("a.webp", {"lossless": True}),
    ("a.tif", {}),
    ("b.tif", {"compression": "tiff_lzw"}),  # libtiff, which Pillow loads by another way
]


@pytest.mark.parametrize(
    ("name", "options"), _TURNED, ids=lambda value: value if isinstance(value, str) else ""
)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(
    tmp_path: Path, orientation: int, name: str, options: dict[str, Any]
) -> None:
    assert_upright(open_image(save_turned(tmp_path / name, orientation, **options)), orientation)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied_where_pillow_leaves_a_tiff_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, orientation: int
) -> None:
    path = save_turned(tmp_path / "a.tif", orientation)
    # as in Pillow 10.0
    monkeypatch.setattr("PIL.ImageOps.exif_transpose", lambda *_args, **_options: None)
    assert_upright(open_image(path), orientation)


@pytest.mark.parametrize("suffix", [".heic", ".HEIF", ".jp2", ".tga", ".jxl"])
def test_a_picture_of_a_format_that_is_not_read_is_bad_and_says_what_to_do(
    tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"a{suffix}"
    assert is_image_name(path)
    for content in (b"\0\0\0\x18ftypheic", b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic"):
        path.write_bytes(content)
        with pytest.raises(BadImage, match="convert it to PNG or JPEG") as caught:
            open_image(path)
        assert caught.value.reason.startswith(suffix.lower())


def test_a_readable_picture_opens_under_any_name(tmp_path: Path) -> None:
    save(tmp_path / "a.jpg").rename(tmp_path / "a.heic")
    assert open_image(tmp_path / "a.heic").image.size == (32, 32)


def test_damaged_exif_data_loses_no_picture(tmp_path: Path) -> None:
    opened = open_image(
        saved(
            Image.new("RGB", (32, 32), BLUE),
            tmp_path / "a.jpg",
            exif=b"Exif\0\0MM\0*\0\0\0\x08\xff",
        )
    )
    assert opened.image.size == (32, 32)
    assert opened.notes


@pytest.mark.parametrize(
    ("image", "name", "expected", "notes"),
    [
        (Image.new("L", (16, 16), 90), "a.png", (90, 90, 90), ("converted from grey",)),
        (
            Image.new("1", (16, 16), 1),
            "a.png",
            (255, 255, 255),
            ("converted from black and white",),
        ),
        (
            Image.new("CMYK", (16, 16), (0, 255, 255, 0)),
            "a.tif",
            (255, 0, 0),
            ("converted from CMYK without a colour profile",),
        ),
        (Image.new("RGB", (16, 16), BLUE).quantize(4), "a.png", BLUE, ("converted from palette",)),
        (Image.new("RGBA", (16, 16), (*BLUE, 255)), "a.png", BLUE, ("converted from RGBA",)),
        (
            Image.new("RGBA", (16, 16), (0, 0, 0, 0)),
            "a.png",
            (255, 255, 255),
            ("converted from RGBA", "transparent parts laid over white"),
        ),
        (
            Image.new("LA", (16, 16), (0, 0)),
            "a.png",
            (255, 255, 255),
            ("converted from grey with alpha", "transparent parts laid over white"),
        ),
        (
            Image.new("I;16", (16, 16), 257 * 100),
            "a.png",
            (100, 100, 100),
            ("converted from 16-bit grey",),
        ),
        (
            Image.new("I;16", (16, 16), 65535),
            "a.tif",
            (255, 255, 255),
            ("converted from 16-bit grey",),
        ),
        (Image.new("I;16", (16, 16), 300), "a.png", (1, 1, 1), ("converted from 16-bit grey",)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else None,
)
def test_other_modes_are_converted_and_noted(
    tmp_path: Path,
    image: Image.Image,
    name: str,
    expected: tuple[int, int, int],
    notes: tuple[str, ...],
) -> None:
    path = saved(image, tmp_path / name)
    assert open_image(path).notes == notes
    assert pixel(path) == expected


def test_half_transparent_is_mixed_with_white(tmp_path: Path) -> None:
    assert pixel(saved(Image.new("RGBA", (16, 16), (0, 0, 0, 128)), tmp_path / "a.png")) == (
        127,
        127,
        127,
    )


@pytest.mark.parametrize(("mode", "clear"), [("P", 0), ("RGB", (0, 0, 0)), ("L", 0)])
def test_a_transparent_colour_is_laid_over_white(tmp_path: Path, mode: str, clear: object) -> None:
    image = Image.new(mode, (16, 16))
    if image.palette is not None:
        image.putpalette([0, 0, 0, 9, 9, 9])
    path = saved(image, tmp_path / "a.png", transparency=clear)
    assert pixel(path) == (255, 255, 255)
    assert "transparent parts laid over white" in open_image(path).notes


def test_cmyk_jpeg_of_adobe_is_not_inverted(tmp_path: Path) -> None:
    path = saved(Image.new("CMYK", (16, 16), (0, 0, 0, 0)), tmp_path / "a.jpg")
    assert min(pixel(path)) > 250


@pytest.mark.parametrize("value", [0, 0x80FF, 0xFFFF])
def test_16_bit_colour_is_scaled_and_noted(tmp_path: Path, value: int) -> None:
    path = save_png_16_bit_rgb(tmp_path / "a.png", value)
    assert open_image(path).notes == ("converted from 16 bits a channel",)
    assert all(abs(channel - value / 257) <= 1 for channel in pixel(path))


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_an_animation_gives_its_first_frame(tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "lime")]
    path = saved(frames[0], tmp_path / name, save_all=True, append_images=frames[1:], duration=50)
    assert "first of 3 frames" in open_image(path).notes
    red, green, blue = pixel(path)
    assert red > 240
    assert max(green, blue) < 15


def test_pixels_are_float_in_minus_one_to_one(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    columns = np.zeros((32, 64, 3), np.uint8)
    columns[:, 32:] = 255
    Image.fromarray(columns).save(path)
    pixels = load_pixels(path, width=64, height=32, flip=False)
    assert (pixels.shape, pixels.dtype) == ((3, 32, 64), torch.float32)
    assert (pixels[:, :, :32] == -1).all()
    assert (pixels[:, :, 32:] == 1).all()
    assert torch.equal(load_pixels(path, 64, 32, flip=True), pixels.flip(2))


def test_pixels_cover_the_size_and_are_cut_at_the_centre(tmp_path: Path) -> None:
    # Three squares side by side; a square view must show the middle one only.
    strip = np.zeros((40, 120, 3), np.uint8)
    strip[:, 40:80] = 255
    Image.fromarray(strip).save(tmp_path / "a.png")
    assert (load_pixels(tmp_path / "a.png", 16, 16, flip=False) == 1).all()


def test_cutting_first_equals_resizing_first(tmp_path: Path) -> None:
    path = save_noise(tmp_path / "a.png", size=(96, 64))
    whole = functional.pil_to_tensor(open_image(path).image)
    resized = functional.resize(
        whole, [32, 48], functional.InterpolationMode.BICUBIC, antialias=True
    )
    expected = functional.center_crop(resized, [32, 32]) / 127.5 - 1
    got = load_pixels(path, 32, 32, flip=False)
    # The two differ only where the filter (bicubic, radius 2 output pixels) reaches over the cut.
    assert torch.allclose(got[:, :, 2:-2], expected[:, :, 2:-2], atol=1.01 / 127.5)


def test_a_fine_pattern_is_averaged_not_sampled(tmp_path: Path) -> None:
    checkers = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(checkers).save(tmp_path / "a.png")
    pixels = load_pixels(tmp_path / "a.png", 16, 16, flip=False)
    assert pixels.abs().max() <= 2 / 127.5


@pytest.mark.parametrize("size", [(4000, 16), (16, 4000), (17, 16)])
def test_any_proportions_give_the_size_asked_for(tmp_path: Path, size: tuple[int, int]) -> None:
    path = save(tmp_path / "a.png", size=size)
    assert load_pixels(path, 96, 48, flip=False).shape == (3, 48, 96)
