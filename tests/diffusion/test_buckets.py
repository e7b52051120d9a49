import pytest
from hypothesis import given
from hypothesis import strategies as st

from qzo_diffusion.core.errors import ConfigError
from qzo_diffusion.diffusion.buckets import Bucket, bucket_shapes, nearest_bucket


def test_the_shapes_of_stable_diffusion_3_5() -> None:
    wide = {(1152, 896), (1216, 832), (1344, 768), (1472, 704)}
    assert set(bucket_shapes(1024)) == {(1024, 1024)} | wide | {
        (height, width) for width, height in wide
    }


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((500, 500), (1024, 1024)),
        ((4000, 3000), (1152, 896)),
        ((3000, 4000), (896, 1152)),
        ((1920, 1080), (1344, 768)),
        ((100_000, 16), (1472, 704)),
        ((16, 100_000), (704, 1472)),
    ],
)
def test_the_nearest_proportions_win(size: Bucket, bucket: Bucket) -> None:
    assert nearest_bucket(*size, 1024) == bucket


def test_small_resolutions_have_sensible_shapes() -> None:
    assert bucket_shapes(64) == ((64, 64), (80, 48), (48, 80), (96, 48), (48, 96))
    assert bucket_shapes(16) == ((16, 16),)
    with pytest.raises(ConfigError):
        bucket_shapes(15)


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(16, 4096))
def test_no_image_is_rejected(width: int, height: int, resolution: int) -> None:
    bucket_width, bucket_height = nearest_bucket(width, height, resolution)
    assert bucket_width % 16 == bucket_height % 16 == 0
    assert min(bucket_width, bucket_height) >= 16
    # A quarter from the shape, and at most half a stride of 16 on each side of the square.
    square = max(16, round(resolution / 16) * 16)
    assert abs(bucket_width * bucket_height / square**2 - 1) <= 0.25
    assert (bucket_width >= bucket_height) or width <= height
