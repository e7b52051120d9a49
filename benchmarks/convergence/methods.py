"""The methods that are compared, and the cells that follow from those that are finished.

A family is one method. Where it has a grid of rates, the first seed runs over the grid, which grows
while the best rate lies at its edge. Further seeds run at the best rate alone. Settings are those
of a run of `qzo-diffuse train`; what no family names is `benchmarks.content.methods.DEFAULT`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.content.cells import Cell
from benchmarks.content.methods import (
    DEFAULT,
    DENSE,
    FIRST_ORDER,
    FIRST_ORDER_DENSE,
    Settings,
    changed,
)
from benchmarks.convergence.rates import best_exponent, next_exponents, rate
from benchmarks.pictures.methods import COMPARED, ROWS, SHOWN
from benchmarks.pictures.methods import DEFAULT as BY_ROWS
from qzo_diffusion.train.calibrate import calibration_batches

PASSES_OF_STEP = 32
STEPS = 500
BUDGET = STEPS * PASSES_OF_STEP
EXACT_STEPS, EXACT_BATCH = 100, 16

EXPONENTS = range(-24, 13)  # of √10, that a grid may grow to
REFERENCES = ("paper_relative", "paper_absolute")
OURS = ("subspace", "default")  # the demo's settings, and those of a model without directions
EXACT = "first_order_dense"  # whose gain shares are shares of


@dataclass(frozen=True)
class Family:
    """A method and the rates that are tried.

    grid: exponents of √10; none where the settings name the rate. seeds: at the best rate.
    exact: by exact gradients, whose passes go forwards and backwards and are counted apart, and
    whose lowest loss counts, not the last.
    """

    name: str
    what: str
    settings: Settings
    grid: tuple[int, ...] = ()
    seeds: int = 1
    steps: int = STEPS
    exact: bool = False

    @property
    def passes_of_step(self) -> int:
        return EXACT_BATCH if self.exact else PASSES_OF_STEP

    def passes(self, step: int) -> int:
        """Passes of one example until so many steps are done; a calibration comes before them."""
        batch = int(self.settings["data"]["batch_size"])
        calibrated = step > 0 and bool(self.settings["train"]["calibrate_lr"])
        before = 3 * calibration_batches(batch) * batch if calibrated else 0
        return before + step * self.passes_of_step

    def at(self, exponent: int | None) -> tuple[str, Settings]:
        """The method's name and settings at a rate of the grid, or at its own."""
        if exponent is None:
            return self.name, self.settings
        found = rate(exponent)
        return f"{self.name}_{found:g}", changed(self.settings, train__lr=found)

    def cell(self, style: str, exponent: int | None, seed: int) -> Cell:
        return Cell(style, self.at(exponent)[0], self.steps, seed)


def _measured(settings: Settings, every: int, keep: bool = False) -> Settings:
    """The same with its held-out loss measured every so many steps; `keep` keeps those steps."""
    return changed(settings, train__validate_every=every, train__checkpoint_every=every * keep)


ONE_DIRECTION = changed(
    DEFAULT,
    train__calibrate_lr=False,
    train__schedule="constant",
    data__batch_size=16,
    **DENSE,
)
ABSOLUTE = changed(
    ONE_DIRECTION,
    qzo__units="absolute",
    qzo__eps=1e-3,
    qzo__directions="gaussian",
    qzo__clip_threshold=100,
)
ADAPTERS = {"rank": 8, "alpha": 16.0}


def _families() -> list[Family]:
    probed = [
        Family(
            "paper_relative",
            "reference: one dense Rademacher direction in relative units, SGD",
            _measured(ONE_DIRECTION, 50),
            (-3, -2, -1),
            seeds=3,
        ),
        Family(
            "paper_absolute",
            "reference: one dense Gaussian direction in absolute units, clipped at 100, SGD",
            _measured(ABSOLUTE, 50),
            (-6, -5, -4),
            seeds=3,
        ),
        Family(
            "default",
            "eight directions of each of four examples, rows of the layers that draw the image, "
            "patch groups, calibrated: the default",
            _measured(COMPARED[BY_ROWS], 25),
            seeds=3,
        ),
        Family(
            "subspace",
            "the same along the directions that the model's own styles have in common: the demo",
            _measured(COMPARED[SHOWN], 25),
            seeds=3,
        ),
    ]
    exact = {
        "first_order": ("the same rows", changed(FIRST_ORDER, **ROWS), (-5, -4, -3)),
        EXACT: ("a number for every scale", FIRST_ORDER_DENSE, (-5, -4, -3)),
        "qlora": (
            "adapters of rank 8 beside every layer (QLoRA)",
            FIRST_ORDER | {"adapters": ADAPTERS},
            (-6, -5, -4),
        ),
    }
    return probed + [
        Family(
            name,
            f"Adam on the exact gradient of {numbers}, {EXACT_STEPS} steps of {EXACT_BATCH}",
            _measured(settings, 10, keep=True),
            grid,
            steps=EXACT_STEPS,
            exact=True,
        )
        for name, (numbers, settings, grid) in exact.items()
    ]


Families = Mapping[str, Family]
FAMILIES: Families = {family.name: family for family in _families()}

FinalLosses = Mapping[str, float]
"""Name of a finished cell -> its held-out loss, infinite where it diverged."""


def by_exponent(family: Family, style: str, final: FinalLosses) -> dict[int, float]:
    """The losses of the first seed at all rates that were run."""
    names = {exponent: family.cell(style, exponent, 0).name for exponent in EXPONENTS}
    return {exponent: final[name] for exponent, name in names.items() if name in final}


def settled(family: Family, style: str, final: FinalLosses) -> tuple[bool, int | None]:
    """Whether the rate is known, and its exponent; None where the settings name it."""
    if not family.grid:
        return True, None
    found = by_exponent(family, style, final)
    if next_exponents(family.grid, found):
        return False, None
    best = best_exponent(found)
    return best is not None, best


def open_cells(
    style: str, final: FinalLosses, families: Families = FAMILIES
) -> list[tuple[Family, Cell, Settings]]:
    """The cells that can be run now. More of them follow from the results of these.

    Of two references, the better one alone runs on further seeds.
    """
    found: list[tuple[Family, Cell, Settings]] = []
    for family in families.values():
        known, exponent = settled(family, style, final)
        tried = by_exponent(family, style, final)
        rates = [exponent] if known else list(next_exponents(family.grid, tried))
        several = family.name not in REFERENCES or family.name == reference(style, final, families)
        seeds = family.seeds if known and several else 1
        for one in rates:
            settings = family.at(one)[1]
            found += [(family, family.cell(style, one, seed), settings) for seed in range(seeds)]
    return [entry for entry in found if entry[1].name not in final]


def reference(style: str, final: FinalLosses, families: Families = FAMILIES) -> str | None:
    """The one whose first seed ends lowest; None before the rates of all are known."""
    ends = {}
    for name in REFERENCES:
        known, exponent = settled(families[name], style, final)
        if not known:
            return None
        ends[name] = final.get(families[name].cell(style, exponent, 0).name, math.inf)
    return min(ends, key=lambda name: ends[name])
