from pathlib import Path

import pytest
import torch

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.diffusion.cache import TensorCache
from qzo_diffusion.diffusion.latents import LatentSet, _key, encode_samples
from qzo_diffusion.diffusion.sample import Sample
from qzo_diffusion.diffusion.style_folder import read_style_folder
from tests.diffusion.image_files import load_pixels, save, save_noise


class Encoder:
    """Keeps every eighth pixel, and counts how often it is asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        assert pixels.ndim == 4
        assert pixels.shape[:2] == (1, 3)
        assert pixels.dtype == torch.float32
        assert not torch.is_grad_enabled()
        self.calls += 1
        return pixels[:, :, ::8, ::8].to(torch.bfloat16)


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    folder = tmp_path / "imgs"
    save(folder / "a.png", colour=(255, 0, 0))
    save_noise(folder / "b.png", size=(96, 48))
    return read_style_folder(folder, resolution=64, caption="a cat").samples


def encode(
    samples: list[Sample], cache: TensorCache, encoder: object, **changes: object
) -> LatentSet:
    options = {"cache": cache, "encoder_id": "vae", "dtype": "bfloat16", "flip": False, **changes}
    return encode_samples(samples, encoder, **options)  # type: ignore[arg-type]


def test_latents_by_sample_and_mirror(tmp_path: Path, samples: list[Sample]) -> None:
    latents = encode(samples, TensorCache(tmp_path / "cache"), Encoder(), flip=True)
    for sample in samples:
        for flipped in (False, True):
            pixels = load_pixels(sample.path, sample.width, sample.height, flipped)
            got = latents.latents(sample.id, flipped)
            assert got.shape == (3, sample.height // 8, sample.width // 8)
            assert torch.equal(got, pixels[:, ::8, ::8].to(torch.bfloat16))
    assert not torch.equal(latents.latents("b.png", False), latents.latents("b.png", True))


def test_latents_of_tiffs_that_were_turned_twice_are_not_used(
    tmp_path: Path, samples: list[Sample]
) -> None:
    cache, encoder = TensorCache(tmp_path / "cache"), Encoder()
    cache.put(
        {**_key(samples[0], False, "vae", "bfloat16"), "version": 1},
        {"latents": torch.zeros(3, 8, 8)},
    )
    encode(samples[:1], cache, encoder)
    assert encoder.calls == 1


def test_the_encoder_is_not_called_when_everything_is_cached(
    tmp_path: Path, samples: list[Sample]
) -> None:
    encoder = Encoder()
    first = encode(samples, TensorCache(tmp_path / "cache"), encoder, flip=True)
    assert encoder.calls == 4

    def must_not_be_called(pixels: torch.Tensor) -> torch.Tensor:
        raise AssertionError("encoded again")

    for sample in samples:
        sample.path.unlink()  # not even the files are opened
    again = encode(samples, TensorCache(tmp_path / "cache"), must_not_be_called, flip=True)
    assert all(torch.equal(first.by_key[key], again.by_key[key]) for key in first.by_key)
    assert first.by_key.keys() == again.by_key.keys()


@pytest.mark.parametrize("change", [{"encoder_id": "other"}, {"dtype": "float32"}])
def test_another_encoder_or_precision_is_not_served_from_the_cache(
    tmp_path: Path, samples: list[Sample], change: dict[str, str]
) -> None:
    cache, encoder = TensorCache(tmp_path / "cache"), Encoder()
    encode(samples, cache, encoder)
    encode(samples, cache, encoder, **change)
    assert encoder.calls == 4


def test_another_resolution_is_not_served_from_the_cache(
    tmp_path: Path, samples: list[Sample]
) -> None:
    cache = TensorCache(tmp_path / "cache")
    encode(samples, cache, Encoder())
    larger = read_style_folder(tmp_path / "imgs", resolution=128, caption="a cat").samples
    assert encode(larger, cache, Encoder()).latents("a.png", False).shape == (3, 16, 16)


def test_a_changed_file_is_encoded_again_and_a_renamed_one_is_not(
    tmp_path: Path, samples: list[Sample]
) -> None:
    cache, encoder = TensorCache(tmp_path / "cache"), Encoder()
    encode(samples, cache, encoder)
    (tmp_path / "imgs/b.png").rename(tmp_path / "imgs/c.png")
    save(tmp_path / "imgs/a.png", colour=(0, 0, 255))
    latents = encode(
        read_style_folder(tmp_path / "imgs", resolution=64, caption="x").samples, cache, encoder
    )
    assert encoder.calls == 3
    assert latents.latents("a.png", False)[:, 0, 0].tolist() == [-1, -1, 1]


def test_a_damaged_entry_is_encoded_again(tmp_path: Path, samples: list[Sample]) -> None:
    cache, encoder = TensorCache(tmp_path / "cache"), Encoder()
    encode(samples, cache, encoder)
    next(cache.folder.iterdir()).write_bytes(b"rubbish")
    encode(samples, cache, encoder)
    encode(samples, cache, encoder)
    assert encoder.calls == 3


def test_progress_counts_mirror_images_too(tmp_path: Path, samples: list[Sample]) -> None:
    seen: list[tuple[int, int]] = []
    encode(
        samples,
        TensorCache(tmp_path / "cache"),
        Encoder(),
        flip=True,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_mirror_image_that_was_not_encoded_is_not_there(
    tmp_path: Path, samples: list[Sample]
) -> None:
    with pytest.raises(KeyError):
        encode(samples, TensorCache(tmp_path / "cache"), Encoder()).latents("a.png", True)


def test_latents_serve_in_a_backward_pass(tmp_path: Path, samples: list[Sample]) -> None:
    latents = (
        encode(samples, TensorCache(tmp_path / "cache"), Encoder()).latents("a.png", False).float()
    )
    weight = torch.ones((), requires_grad=True)
    (weight * latents).sum().backward()
    assert weight.grad == latents.sum()


def test_an_encoder_that_overflows_is_an_error_and_nothing_is_cached(
    tmp_path: Path, samples: list[Sample]
) -> None:
    cache = TensorCache(tmp_path / "cache")
    with pytest.raises(ModelError, match=r"NaN or infinite latents for .*a\.png"):
        encode(samples, cache, lambda pixels: pixels * float("nan"))
    assert not cache.folder.exists()


def test_an_encoder_of_the_wrong_shape_is_refused(tmp_path: Path, samples: list[Sample]) -> None:
    with pytest.raises(ValueError, match="for one image"):
        encode(samples, TensorCache(tmp_path / "cache"), lambda pixels: pixels[0])
