import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from qzo_diffusion.diffusion.colour import by_strips
from qzo_diffusion.diffusion.images import open_image
from tests.diffusion.icc_profiles import (
    ADOBE_RGB,
    WIDE_GAMUT,
    cmyk_profile,
    grey_profile,
    rgb_profile,
)

RED = (230, 60, 40)
CONVERTED = "colours converted to sRGB from a test"
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def saved(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def stored_in(profile: bytes, colour: tuple[int, ...] = RED) -> tuple[int, ...]:
    """The numbers that mean `colour` of sRGB in the space of `profile`."""
    own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    converted = ImageCms.profileToProfile(
        Image.new("RGB", (1, 1), colour), ImageCms.createProfile("sRGB"), own
    )
    return converted.getpixel((0, 0))  # type: ignore[union-attr,return-value]


def assert_shows(path: Path, colour: tuple[int, ...], *notes: str, within: int = 3) -> None:
    opened = open_image(path)
    assert opened.image.mode == "RGB"
    shown = np.asarray(opened.image).astype(int)
    assert np.abs(shown - colour).max() <= within, shown[0, 0]
    assert opened.notes == notes


@pytest.mark.parametrize("profile", [rgb_profile(ADOBE_RGB, 2.2), rgb_profile(WIDE_GAMUT, 1.8)])
@pytest.mark.parametrize(
    ("name", "options"),
    [("a.png", {}), ("a.webp", {"lossless": True}), ("a.tif", {}), ("a.jpg", {"quality": 100})],
)
def test_a_profile_is_converted_in_every_format(
    tmp_path: Path, profile: bytes, name: str, options: dict[str, Any]
) -> None:
    colour = stored_in(profile)
    assert max(np.abs(np.subtract(colour, RED))) > 10
    image = Image.new("RGB", (32, 32), colour)
    assert_shows(saved(tmp_path / name, image, icc_profile=profile, **options), RED, CONVERTED)


def test_the_profile_of_srgb_changes_nothing(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", Image.new("RGB", (32, 32), RED), icc_profile=SRGB)
    assert_shows(path, RED, within=0)


def test_a_palette_with_transparency_is_converted_and_laid_over_white(tmp_path: Path) -> None:
    profile = rgb_profile(WIDE_GAMUT, 1.8)
    image = Image.new("P", (32, 32), 1)
    image.putpalette([0, 0, 0, *stored_in(profile)])
    image.paste(0, (0, 0, 32, 16))
    path = saved(tmp_path / "a.png", image, transparency=0, icc_profile=profile)
    opened = open_image(path)
    assert opened.image.getpixel((0, 0)) == (255, 255, 255)
    assert np.abs(np.subtract(opened.image.getpixel((0, 31)), RED)).max() <= 3
    assert opened.notes == (
        "converted from palette",
        CONVERTED,
        "transparent parts laid over white",
    )


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_grey_by_its_own_profile(tmp_path: Path, mode: str) -> None:
    """255 · (100 / 255)^1 in light is 255 · (100 / 255)^(1 / 2.4 or so) in sRGB."""
    value: Any = {"L": 100, "LA": (100, 255), "I;16": 257 * 100}[mode]
    image = Image.new(mode, (32, 32), value)
    path = saved(tmp_path / "a.png", image, icc_profile=grey_profile(1.0))
    assert_shows(path, (168, 168, 168), open_image(path).notes[0], CONVERTED, within=2)


def test_grey_with_the_profile_of_a_screen(tmp_path: Path) -> None:
    image = Image.new("L", (32, 32), 90)
    path = saved(tmp_path / "a.jpg", image, icc_profile=SRGB)
    assert_shows(path, (90, 90, 90), "converted from grey", within=1)


@pytest.mark.parametrize("name", ["a.jpg", "a.tif"])
def test_cmyk_by_its_profile(tmp_path: Path, name: str) -> None:
    image = Image.new("CMYK", (32, 32), (255, 255, 0, 0))
    path = saved(tmp_path / name, image, icc_profile=cmyk_profile())
    assert_shows(path, (119, 119, 119), "converted from CMYK", CONVERTED, within=4)


def test_lab_is_converted(tmp_path: Path) -> None:
    image = Image.new("LAB", (32, 32), (128, 128, 128))
    opened = open_image(saved(tmp_path / "a.tif", image))
    assert np.ptp(np.asarray(opened.image)[0, 0].astype(int)) <= 2
    assert "converted from LAB" in opened.notes


@pytest.mark.parametrize(
    ("mode", "profile", "reason"),
    [
        ("RGB", b"\0" * 40, "unusable"),
        ("RGB", rgb_profile(ADOBE_RGB, 2.2)[:200], "unusable"),
        ("RGB", cmyk_profile(), "a profile of CMYK for RGB pixels"),
        ("RGB", grey_profile(2.2), "a profile of GRAY for RGB pixels"),
        ("CMYK", rgb_profile(ADOBE_RGB, 2.2), "a profile of RGB for CMYK pixels"),
    ],
)
def test_an_unusable_profile_costs_no_picture(
    tmp_path: Path, mode: str, profile: bytes, reason: str
) -> None:
    path = saved(tmp_path / "a.tif", Image.new(mode, (32, 32)), icc_profile=profile)
    opened = open_image(path)
    assert opened.image.getpixel((0, 0)) == ((0, 0, 0) if mode == "RGB" else (255, 255, 255))
    (note,) = [note for note in opened.notes if "unusable" in note]
    assert reason in note


def test_every_damaged_byte_of_a_profile_costs_no_picture(tmp_path: Path) -> None:
    profile = rgb_profile(ADOBE_RGB, 2.2)
    for at in range(0, len(profile), 7):
        damaged = profile[:at] + bytes([profile[at] ^ 0xFF]) + profile[at + 1 :]
        image = Image.new("RGB", (16, 16), RED)
        opened = open_image(saved(tmp_path / "a.png", image, icc_profile=damaged))
        assert opened.image.size == (16, 16)


def chunk(kind: bytes, data: bytes, crc: int | None = None) -> bytes:
    crc = zlib.crc32(kind + data) if crc is None else crc
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


@pytest.mark.parametrize(
    "odd",
    [
        chunk(b"tEXt", b"Comment\0hello", crc=1),
        chunk(b"zTXt", b"parameters\0\0" + zlib.compress(bytes(3_000_000))),
        chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(bytes(3_000_000))),
        chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(3_000_000))),
        chunk(b"iCCP", b"icc\0\0nonsense"),
        chunk(b"gAMA", b"\0"),
        chunk(b"pHYs", b"\0"),
        chunk(b"cHRM", b"\0\0\0"),
        chunk(b"eXIf", b"nonsense"),
        chunk(b"acTL", b"\0"),
    ],
    ids=lambda data: data[4:8].decode(),
)
def test_odd_metadata_of_a_png_costs_no_picture(tmp_path: Path, odd: bytes) -> None:
    path = saved(tmp_path / "a.png", Image.new("RGB", (32, 32), RED))
    data = path.read_bytes()
    path.write_bytes(data[:33] + odd + data[33:])
    opened = open_image(path)
    assert opened.image.getpixel((0, 0)) == RED


def test_the_profile_is_kept_where_a_text_is_odd(tmp_path: Path) -> None:
    profile = rgb_profile(ADOBE_RGB, 2.2)
    image = Image.new("RGB", (32, 32), stored_in(profile))
    path = saved(tmp_path / "a.png", image, icc_profile=profile)
    data = path.read_bytes()
    path.write_bytes(data[:33] + chunk(b"tEXt", b"a\0b", crc=1) + data[33:])
    assert_shows(path, RED, "metadata unreadable and left out (UnidentifiedImageError)", CONVERTED)


@pytest.mark.parametrize(
    "segment",
    [b"\xff\xe2\0\x10MPF\0II*\0\xff\xff\xff\x7f\0\0", b"\xff\xed\0\x08Photo\0", b"\xff\xe1\0\x02"],
)
def test_odd_segments_of_a_jpeg_cost_no_picture(tmp_path: Path, segment: bytes) -> None:
    path = saved(tmp_path / "a.jpg", Image.new("RGB", (32, 32), RED))
    data = path.read_bytes()
    path.write_bytes(data[:2] + segment + data[2:])
    assert open_image(path).image.size == (32, 32)


def test_a_webp_with_a_damaged_profile(tmp_path: Path) -> None:
    image = Image.new("RGB", (32, 32), RED)
    path = saved(tmp_path / "a.webp", image, lossless=True, icc_profile=b"nonsense" * 9)
    assert open_image(path).image.getpixel((0, 0)) == RED


def test_adobe_rgb_by_exif_alone_and_gamma_are_noted(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA005] = {1: "R03"}
    path = saved(tmp_path / "a.jpg", Image.new("RGB", (32, 32), RED), exif=exif)
    assert open_image(path).notes == (
        "Adobe RGB by its EXIF data, without a profile; taken as sRGB",
    )
    information = PngImagePlugin.PngInfo()
    information.add(b"gAMA", struct.pack(">I", 100_000))
    path = saved(tmp_path / "a.png", Image.new("RGB", (32, 32), RED), pnginfo=information)
    assert open_image(path).notes == ("a gamma of 1 in its header is not applied",)


def test_strips_give_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qzo_diffusion.diffusion.colour._STRIP", 100)
    pixels = np.random.default_rng(0).integers(0, 256, (37, 30), dtype=np.uint8)
    image = Image.fromarray(pixels)
    whole = image.convert("RGB")
    assert by_strips(image, lambda strip: strip.convert("RGB")).tobytes() == whole.tobytes()
