"""Masks: what they hide changes nothing, and what they show counts by its share."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qzo_diffusion.core.errors import DataError
from qzo_diffusion.diffusion.cache import TensorCache
from qzo_diffusion.diffusion.flow_matching import Batch, denoising_loss
from qzo_diffusion.diffusion.latents import encode_samples
from qzo_diffusion.diffusion.masks import open_masked, visible_image, weights_of
from qzo_diffusion.diffusion.style_folder import StyleFolder, read_style_folder
from tests.diffusion.image_files import save


def drawing(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)


def half_mask() -> np.ndarray:
    """The left half counts, and a quarter of the next eight columns."""
    mask = np.zeros((64, 64), np.uint8)
    mask[:, :32] = 255
    mask[:, 32:40] = 51  # a fifth
    return mask


def write(folder: Path, kind: str, hidden: int) -> StyleFolder:
    """One picture with a mask; `hidden` chooses what is under it."""
    folder.mkdir()
    pixels, mask = drawing(), half_mask()
    pixels[:, 40:] = drawing(hidden)[:, 40:]
    if kind == "alpha":
        Image.fromarray(np.dstack([pixels, mask])).save(folder / "a.png")
    else:
        Image.fromarray(pixels).save(folder / "a.png")
        Image.fromarray(mask).save(folder / "a_mask.png")
    return read_style_folder(folder, resolution=64, caption="x", masks=kind)


def encoder(pixels: torch.Tensor) -> torch.Tensor:
    """Every latent depends on every pixel."""
    small = torch.nn.functional.avg_pool2d(pixels, 8)
    return small + pixels.mean()


def encoded(style: StyleFolder, cache: Path, flip: bool = False):
    options = {"encoder_id": "x", "dtype": "float32", "flip": flip}
    return encode_samples(style.samples, encoder, cache=TensorCache(cache), **options)


@pytest.mark.parametrize("kind", ["alpha", "file"])
def test_what_lies_under_a_mask_changes_no_bit(tmp_path, kind):
    one, other = (write(tmp_path / str(seed), kind, seed) for seed in (1, 2))
    files = [style.samples[0].path.read_bytes() for style in (one, other)]
    assert files[0] != files[1]
    assert one.samples[0].sha256 == other.samples[0].sha256
    first, second = (
        encoded(style, tmp_path / f"cache{at}") for at, style in enumerate((one, other))
    )
    key = ("a.png", False)
    assert torch.equal(first.by_key[key], second.by_key[key])
    assert torch.equal(first.masks[key], second.masks[key])
    shown = [np.asarray(visible_image(style.samples[0])) for style in (one, other)]
    assert (shown[0] == shown[1]).all()
    assert (shown[0][:, 40:] == 255).all()
    unmasked = [
        encoded(read_style_folder(tmp_path / str(seed), resolution=64, caption="x"), tmp_path / "u")
        for seed in (1, 2)
    ]
    if kind == "file":
        assert not torch.equal(*(one.by_key[key] for one in unmasked))


@pytest.mark.parametrize("kind", ["alpha", "file"])
def test_a_latent_counts_by_the_share_of_the_mask_over_it_and_turns_with_its_picture(
    tmp_path, kind
):
    style = write(tmp_path / "imgs", kind, 1)
    for _ in range(2):  # computed, then from the cache
        latents = encoded(style, tmp_path / "cache", flip=True)
        row = torch.tensor([1.0] * 4 + [0.2] + [0.0] * 3)
        torch.testing.assert_close(latents.masks["a.png", False], row.expand(1, 8, 8))
        assert torch.equal(latents.masks["a.png", True], latents.masks["a.png", False].flip(-1))


def test_a_mask_is_cut_as_its_picture_is(tmp_path):
    picture = Image.new("L", (128, 64))
    picture.paste(255, (32, 0, 96, 64))  # the square in the middle, which a square bucket shows
    save(tmp_path / "a.png", size=(128, 64))
    (sample,) = read_style_folder(tmp_path, resolution=64, caption="x").samples
    square = replace(sample, width=64, height=64)
    assert torch.equal(
        weights_of(picture, square, False, torch.zeros(4, 8, 8)), torch.ones(1, 8, 8)
    )


def test_a_picture_without_a_mask_counts_as_a_whole_and_is_named(tmp_path):
    write(tmp_path / "imgs", "file", 1)
    save(tmp_path / "imgs" / "b.png", size=(64, 64))
    style = read_style_folder(tmp_path / "imgs", resolution=64, caption="x", masks="file")
    assert "1 of 2 images have a mask; all of these counts: b.png" in style.notes
    assert not any("no data" in note for note in style.notes)
    latents = encoded(style, tmp_path / "cache")
    weights = latents.weights([("b.png", False), ("a.png", False)])
    assert torch.equal(weights[0], torch.ones(1, 8, 8))
    assert torch.equal(weights[1], latents.masks["a.png", False])
    plain = read_style_folder(tmp_path / "imgs", resolution=64, caption="x")
    assert [sample.mask for sample in plain.samples] == ["none", "none"]
    assert encoded(plain, tmp_path / "cache").weights([("b.png", False)]) is None


def test_masks_that_fit_no_picture_are_refused(tmp_path):
    for name, size, colour in (("small", (32, 64), 255), ("black", (64, 64), 0)):
        save(tmp_path / f"{name}.png", size=(64, 64))
        Image.new("L", size, colour).save(tmp_path / f"{name}_mask.png")
    save(tmp_path / "text.png", size=(64, 64), colour=(1, 2, 3))
    (tmp_path / "text_mask.png").write_text("no picture")
    write(tmp_path / "good", "file", 1)
    style = read_style_folder(tmp_path, resolution=64, caption="x", masks="file")
    reasons = dict(style.bad)
    assert reasons["small.png"] == "its mask has 32x64 pixels, the picture 64x64"
    assert reasons["black.png"] == "its mask hides all of it"
    assert reasons["text.png"].startswith("its mask text_mask.png: not an image")


@pytest.mark.parametrize("kind", ["alpha", "file"])
def test_masks_that_are_asked_for_must_be_there(tmp_path, kind):
    save(tmp_path / "a.png", size=(64, 64))
    Image.new("RGBA", (64, 64), (1, 2, 3, 255)).save(tmp_path / "opaque.png")
    with pytest.raises(DataError, match=f"data.masks={kind}"):
        read_style_folder(tmp_path, resolution=64, caption="x", masks=kind)


def test_an_alpha_channel_turns_with_its_picture(tmp_path):
    mask = Image.new("L", (64, 32), 255)
    mask.paste(0, (0, 0, 8, 32))
    picture = Image.new("RGBA", (64, 32))
    picture.putalpha(mask)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.png", exif=exif)
    opened, found = open_masked(tmp_path / "a.png", "alpha")
    assert opened.image.size == found.size == (32, 64)
    assert (np.asarray(found)[:8] == 0).all()
    assert (np.asarray(found)[8:] == 255).all()


def make_batch(count: int = 3, **changes) -> Batch:
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(count, 4, 8, 8, generator=generator) for _ in range(2))
    zeros = torch.zeros(count, 2, 8)
    return Batch(latents, noise, torch.linspace(0, 1, count), zeros, zeros[:, 0], **changes)


def loss(batch: Batch) -> torch.Tensor:
    return denoising_loss(torch.zeros_like(batch.latents), batch)


def places(count: int = 3) -> torch.Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("groups", [1, 4])
def test_squared_errors_are_weighted_place_by_place(groups):
    weight = places()
    batch = make_batch(weight=weight, patch_groups=groups)
    error = (weight.double() * (batch.noise - batch.latents).double().square()).mean(1)
    # a patch group of four is two rows of patches, four rows of latents over two: 8 rows / 4
    expected = error.view(3, groups, -1).mean(2)
    expected = expected.squeeze(1) if groups == 1 else expected
    torch.testing.assert_close(loss(batch).double(), expected, rtol=1e-5, atol=0)


def test_a_mask_of_ones_changes_no_bit():
    for groups in (1, 4):
        plain = make_batch(patch_groups=groups)
        masked = replace(plain, weight=torch.ones(3, 1, 8, 8))
        assert torch.equal(loss(plain), loss(masked))


def test_a_hidden_group_has_no_loss():
    weight = torch.ones(3, 1, 8, 8)
    weight[:, :, :2] = 0  # the first of four runs of patches
    found = loss(make_batch(weight=weight, patch_groups=4))
    assert (found[:, 0] == 0).all()
    assert (found[:, 1:] > 0).all()


def test_weights_of_examples_and_of_places_go_together():
    masked = make_batch(weight=places())
    assert torch.equal(masked.weighted(0.5).weight, 0.5 * places())
    prior = make_batch().weighted(0.25)
    both = Batch.joined([masked.weighted(1.0), prior])
    assert both.weight.shape == (6, 1, 8, 8)
    assert torch.equal(loss(both), torch.cat([loss(masked), loss(prior)]))
    halves = [part.weight for part in both.split(2)]
    assert torch.equal(torch.cat(halves), both.weight)
    assert torch.equal(both.repeated(2).weight, torch.cat([both.weight] * 2))
