"""Files that are no usable image: damaged, cut off, forged, or too large."""

import contextlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qzo_diffusion.diffusion.images import (
    IMAGE_SUFFIXES,
    MAX_PIXELS,
    BadImage,
    open_image,
)
from tests.diffusion.image_files import (
    save,
    save_bomb,
    save_noise,
    save_truncated,
    saved,
)


def write_text(path: Path) -> Path:
    path.write_text("<html>not found</html>")
    return path


def make_empty(path: Path) -> Path:
    path.touch()
    return path


def make_fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def link_to_nothing(path: Path) -> Path:
    path.symlink_to("nowhere.png")
    return path


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (save_truncated, "damaged or truncated"),
        (make_empty, r"0 bytes"),
        (write_text, "not an image"),
        (lambda path: save(path, size=(1, 1)), "too small: 1x1"),
        (lambda path: save(path, size=(500, 15)), "too small: 500x15"),
        (lambda path: saved(Image.new("F", (16, 16)), path, format="TIFF"), "32-bit"),
        (make_fifo, "not a regular file"),
        (link_to_nothing, "link to nothing"),
        (save_bomb, "too large"),
        (lambda path: save_bomb(path, side=13_350), "too large"),
    ],
    ids=[
        "truncated",
        "empty",
        "text",
        "one-pixel",
        "strip",
        "float",
        "fifo",
        "broken-link",
        "bomb",
        "just-over",
    ],
)
def test_what_cannot_be_used_is_a_bad_image_with_a_reason(
    tmp_path: Path, build: Callable[[Path], Path], reason: str
) -> None:
    path = build(tmp_path / "a.png")
    with pytest.raises(BadImage, match=reason) as caught:
        open_image(path)
    assert caught.value.reason in caught.value.got
    assert str(path) in caught.value.got
    assert pickle.loads(pickle.dumps(caught.value)).reason == caught.value.reason


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_no_format_fails_otherwise_when_cut_off(tmp_path: Path, suffix: str) -> None:
    path = save_noise(tmp_path / f"a{suffix}")
    data = path.read_bytes()
    for length in (1, 9, 40, len(data) // 2):
        path.write_bytes(data[:length])
        with pytest.raises(BadImage):
            open_image(path)


def test_a_bomb_is_refused_before_a_pixel_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(self: Image.Image) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    # a caller may have lifted Pillow's own limit
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    path = save_bomb(tmp_path / "a.png")
    with pytest.raises(BadImage, match=f"30000x30000 pixels, at most {MAX_PIXELS}"):
        open_image(path)


def claim(path: Path, at: int, data: bytes) -> Path:
    """Overwrite some bytes of the header."""
    whole = bytearray(save(path).read_bytes())
    whole[at : at + len(data)] = data
    path.write_bytes(whole)
    return path


def add_scans(path: Path) -> Path:
    noise = Image.open(save_noise(path.with_suffix(".png")))
    data = saved(noise, path, progressive=True).read_bytes()
    start = data.index(b"\xff\xda")
    path.write_bytes(data[:start] + data[start:-2] * 200)
    return path


def write_tiles(path: Path) -> Path:
    saved(Image.new("L", (32, 32)), path, tiffinfo={65000: 65520, 65001: 65520})
    whole = path.read_bytes()
    for tag, other in ((65000, 322), (65001, 323)):
        whole = whole.replace(tag.to_bytes(2, "little"), other.to_bytes(2, "little"))
    path.write_bytes(whole)
    return path


@pytest.mark.parametrize(
    ("build", "name", "reason"),
    [
        (lambda path: save_bomb(path, side=9_000), "a.png", "9000x9000 pixels in a file of"),
        (
            lambda path: claim(path, 18, (9000).to_bytes(4, "little") * 2),
            "a.bmp",
            "9000x9000 pixels in a file of",
        ),
        (
            lambda path: claim(path, 6, (9000).to_bytes(2, "little") * 2),
            "a.gif",
            "9000x9000 pixels in a file of",
        ),
        (add_scans, "a.jpg", "scans"),
        (write_tiles, "a.tif", "tiles of 65520x65520"),
    ],
)
def test_a_forged_header_is_refused_before_anything_is_allocated(
    tmp_path: Path, build: Callable[[Path], Path], name: str, reason: str
) -> None:
    with pytest.raises(BadImage, match=reason):
        open_image(build(tmp_path / name))


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_a_forged_picture_opens_or_is_bad(tmp_path: Path, suffix: str) -> None:
    path = save_noise(tmp_path / f"a{suffix}", size=(24, 16))
    whole, random = path.read_bytes(), np.random.default_rng(1)
    for _ in range(40):
        forged = bytearray(whole)
        for at in random.integers(0, min(len(whole), 300), 3):
            forged[at : at + 4] = random.choice([b"\xff\xff\xff\x7f", b"\0\0\x40\0", b"\xff"])
        path.write_bytes(forged)
        with contextlib.suppress(BadImage):
            assert open_image(path).image.mode == "RGB"
