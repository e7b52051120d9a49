"""How the rows of a file are divided where it is too small for all that is asked."""

import pytest

from qzo_diffusion.runs.llm.splits import fitting


@pytest.mark.parametrize(
    ("rows", "asked", "train", "kept"),
    [
        (400, [1000, 200], 0, [320, 80]),  # the defaults over a small file
        (400, [None, 200], 0, [320, 80]),
        (24, [24, 200], 0, [20, 4]),
        (400, [1000, 1000, 200], 1, [80, 240, 80]),  # one file for all: test first
        (1000, [1000, 10], 0, [990, 10]),
        (400, [300, 200], 0, [300, 200]),  # something is left: as before, the rest is held out
        (2000, [1000, 200], 0, [1000, 200]),
        (400, [1000, 0], 0, [1000, 0]),  # no part is asked for besides training
        (400, [None, 0], 0, [None, 0]),
        (4, [1000, 200], 0, [4, 0]),  # too few for a part: refused with counts later
    ],
)
def test_every_part_gets_rows_where_the_file_has_some(rows, asked, train, kept):
    assert fitting(rows, asked, train) == kept


@pytest.mark.parametrize("rows", [5, 17, 399, 1001, 1199, 5000])
def test_no_row_is_given_twice_and_no_asked_part_is_empty(rows):
    kept = fitting(rows, [1000, 200], train=0)
    assert min(kept) > 0
    drawn = [min(kept[0], rows), min(kept[1], rows - min(kept[0], rows))]
    assert min(drawn) > 0
    assert sum(drawn) <= rows
