"""How many random draws a test of an average takes."""

import pytest


def averaged_over(few: int, many: int):
    """Parametrize `seeds`: a few at every commit, which find an error of twice the size that the
    many find, marked `slow`.
    """
    return pytest.mark.parametrize("seeds", [few, pytest.param(many, marks=pytest.mark.slow)])
