"""Sort names as people count: image_2 before image_10."""

import re
from pathlib import PurePath

_DIGITS = re.compile("([0-9]+)")

Key = tuple[object, ...]


def natural_key(path: PurePath) -> Key:
    """Return a key that sorts folder by folder: digits as numbers, letters without case.

    Names that are equal so (2.png, 02.png) keep the order of text.
    """
    *folders, name = path.parts
    stem, suffix = PurePath(name).stem, PurePath(name).suffix
    places = [*((_counted(one), ()) for one in folders), (_counted(stem), _counted(suffix))]
    return (tuple(places), path.as_posix())


def _counted(name: str) -> Key:
    """Return texts and numbers in turn, beginning with a text, so that equal places hold equal
    types.
    """
    return tuple(
        int(part) if index % 2 else part.casefold()
        for index, part in enumerate(_DIGITS.split(name))
    )
