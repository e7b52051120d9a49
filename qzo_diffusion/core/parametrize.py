"""A parametrization by its name in a config."""

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from torch import Tensor

from qzo_diffusion.core.absolute import DenseAbsolute
from qzo_diffusion.core.dense import Dense
from qzo_diffusion.core.grouped import Grouped
from qzo_diffusion.core.parametrization import Parametrization
from qzo_diffusion.core.scales import ScaleSet
from qzo_diffusion.core.stored import Stored

Level = Literal["dense", "row", "layer", "column", "separable"]
Units = Literal["relative", "absolute"]


def parametrize(
    scales: ScaleSet,
    level: Level,
    units: Units = "relative",
    trained: Sequence[str] | None = None,
    token_wise: Collection[str] = (),
    last_readers: Collection[str] = (),
    stored: Stored | None = None,
    subspace: Mapping[str, Tensor] | None = None,
) -> Parametrization:
    """The parametrization by its name in a config; `trained` names the layers that take part, None
    is all. "separable" trains a θ for every row and one for every block column. The arguments after
    `trained` are for `core.grouped`; dense parametrizations ignore them.

    Raises:
        ValueError: absolute units are defined for level "dense" only.
    """
    if units == "absolute":
        if level != "dense":
            raise ValueError(f"absolute units need level 'dense', got {level!r}")
        return DenseAbsolute(scales, trained)
    if level == "dense":
        return Dense(scales, trained)
    return Grouped(
        scales,
        ("row", "column") if level == "separable" else (level,),
        trained,
        token_wise,
        last_readers,
        stored,
        subspace,
    )
