import pytest
from PIL import Image

from qzo_diffusion.diffusion.sampling import (
    LABEL_HEIGHT,
    SMALLEST_CELL,
    grid,
    join_columns,
    mean_chroma,
    mean_saturation,
)


def plain(colour, size=(64, 64)):
    return Image.new("RGB", size, colour)


def test_grid_has_prompts_as_rows_and_steps_as_columns():
    columns = [[plain("red"), plain("lime")], [plain("blue"), plain("white")]]
    picture = grid(columns, ["step 0", "step 9"])
    assert picture.size == (2 * SMALLEST_CELL, 2 * SMALLEST_CELL + LABEL_HEIGHT)
    middle = SMALLEST_CELL // 2
    seen = [
        [
            picture.getpixel(
                (x * SMALLEST_CELL + middle, LABEL_HEIGHT + y * SMALLEST_CELL + middle)
            )
            for x in range(2)
        ]
        for y in range(2)
    ]
    assert seen == [[(255, 0, 0), (0, 0, 255)], [(0, 255, 0), (255, 255, 255)]]


def test_titles_are_drawn():
    with_title, without = grid([[plain("red")]], ["step 0"]), grid([[plain("red")]], [""])
    assert with_title.tobytes() != without.tobytes()


def test_large_images_are_not_enlarged():
    assert grid([[plain("red", (512, 256))]], ["a"]).size == (512, 256 + LABEL_HEIGHT)


def test_saturation_of_known_colours():
    assert mean_saturation([plain("red")]) == 1.0
    assert mean_saturation([plain("white"), plain("black"), plain("grey")]) == 0.0
    assert mean_saturation([plain("red"), plain("white")]) == pytest.approx(0.5)


def test_saturation_weighs_every_pixel():
    half = plain("red")
    half.paste("white", (0, 0, 64, 32))
    assert mean_saturation([half]) == pytest.approx(0.5)
    assert isinstance(mean_saturation([half]), float)


def test_chroma_counts_colour_by_how_bright_it_is():
    assert mean_chroma([plain("red")]) == 1.0
    assert mean_chroma([plain("white"), plain("black"), plain("grey")]) == 0.0
    dark = plain((20, 5, 5))
    assert mean_saturation([dark]) == pytest.approx(0.75, abs=0.01)
    assert mean_chroma([dark]) == pytest.approx(15 / 255)


def test_joined_columns_keep_their_pixels():
    joined = join_columns([plain("red", (4, 8)), plain("blue", (6, 8))])
    assert joined.size == (10, 8)
    assert joined.getpixel((3, 7)) == (255, 0, 0)
    assert joined.getpixel((4, 0)) == (0, 0, 255)
