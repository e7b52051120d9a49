"""Stage steps: memory and time of a step against two plain forwards, of the default method and of
dense numbers.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.full_size import stepping
from benchmarks.sd35_full_size.model import batch_of, import_everything, load_model

SIDE = 256


def steps(folder: Path, count: int) -> dict[str, Any]:
    import_everything()
    return steps_of(lambda: load_model(folder, folder / "copies"), count)


def steps_of(load: Callable[[], nn.Module], count: int) -> dict[str, Any]:
    from qzo_diffusion.diffusion.families.sd3 import SD3

    return stepping.steps_of(SD3, load, lambda model: batch_of(model, SIDE), count)
