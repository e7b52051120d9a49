"""What is compared: one table of settings, and which cells follow from it and from the cells that
are finished.

A family is one method with a grid of learning rates, all powers of √10. Its first seed runs over
the grid, which grows by itself while the best rate lies at its edge; further seeds run at the best
rate only. A cell is one of those runs on one set of data."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.convergence.settings import (
    BUDGET,
    DATA,
    DEFAULT,
    FIRST_ORDER_STEPS,
    LONG_BUDGET,
    LONGEST_BUDGET,
    MOST_EXTENSIONS,
    TRIED_ON,
    UNSEEN,
    Cell,
    Family,
    Method,
    Phase,
    rate,
)
from qzo_diffusion.config.defaults import MIDDLE_BLOCKS, PICTURES_OVER_QUIET, suited_lr
from qzo_diffusion.core.optimizer import ScheduleName
from qzo_diffusion.core.parametrize import Level
from qzo_diffusion.core.probing import Estimator


def _method(name: str, *phases: Phase, **settings: Any) -> Method:
    return Method(name, lr=math.nan, phases=phases, **settings)


def _families() -> Iterator[Family]:
    yield from _first_order()
    yield from _references()
    yield from _defaults()
    yield from _changed_defaults()
    yield from _antithetic()
    yield from _alternatives()


def _first_order() -> Iterator[Family]:
    grids: dict[Level, tuple[int, ...]] = {
        "dense": (-4, -3, -2),
        "separable": (-3,),
        "row": (-3,),
        "layer": (-2,),
    }
    for level, exponents in grids.items():
        method = _method(
            f"first_order_{level}", Phase(level), first_order=True, budget=FIRST_ORDER_STEPS * 16
        )
        numbers = {"dense": "one number per scale", "separable": "rows and columns"}.get(
            level, f"one number per {level}"
        )
        yield Family(
            method, exponents, f"Adam on the exact gradient, {numbers}, {FIRST_ORDER_STEPS} steps"
        )
    adapters = _method("qlora", Phase("lora"), first_order=True, budget=FIRST_ORDER_STEPS * 16)
    yield Family(
        adapters,
        (-6, -5, -4),
        f"QLoRA: Adam on adapters of rank 8 beside every layer, {FIRST_ORDER_STEPS} steps",
    )


def _references() -> Iterator[Family]:
    relative = Phase("dense")
    absolute = Phase("dense", units="absolute", eps=1e-3, directions="gaussian", clip_threshold=100)
    references: tuple[tuple[str, Phase, tuple[int, ...], str], ...] = (
        (
            "paper_relative",
            relative,
            (-5, -4, -3, -2, -1),
            "dense, relative units, one Rademacher direction, SGD",
        ),
        (
            "paper_absolute",
            absolute,
            (-7, -6, -5, -4, -3),
            "dense, absolute units, one Gaussian direction, clipped at 100, SGD",
        ),
    )
    for name, phase, exponents, what in references:
        yield Family(_method(name, phase), exponents, f"reference: {what}", seeds=3)
        long = _method(f"{name}_long", phase, budget=LONG_BUDGET)
        yield Family(long, (), f"{name} over the long budget", same_rate_as=name)


ANTITHETIC = Phase("separable", per_example=True, regions=16, normalize=True, schedule="cosine")
"""One direction of every example, probed on both sides of it.

16 regions are one for each token of `tiny`.
"""
COSINE = replace(ANTITHETIC, estimator="leave_one_out", num_directions=8)
FIXED = replace(COSINE, schedule="inverse_sqrt")
"""The default at a rate that does not look at the data."""
BEST = replace(FIXED, calibrate=True)
BEST_BATCH = 4


def default_exponent(
    budget: int, estimator: Estimator = "leave_one_out", schedule: ScheduleName = "inverse_sqrt"
) -> float:
    """That of the rate which the package takes where none is given."""
    return 2 * math.log10(suited_lr(budget // 32, estimator, schedule))


DEFAULT_EXPONENT = default_exponent(BUDGET)
ON_TEXT = (
    ("layers", MIDDLE_BLOCKS["qzo.layers"]),
    ("eps", MIDDLE_BLOCKS["qzo.eps"]),
    ("calibrate", False),
    ("schedule", "cosine"),
)
EVERYWHERE, STYLES = (*DATA, UNSEEN), (*DATA[:-1], UNSEEN)


def _defaults() -> Iterator[Family]:
    def method(name: str, phase: Phase, budget: int = BUDGET) -> Method:
        return _method(name, phase, batch=BEST_BATCH, budget=budget)

    at = (DEFAULT_EXPONENT,)
    what = (
        "eight directions of each of four examples, rows and columns, patch groups, normalised, "
        "SGD; "
        "calibrated, on text a cosine"
    )
    of_text = PICTURES_OVER_QUIET * rate(DEFAULT_EXPONENT) / suited_lr(BUDGET // 32)
    yield Family(
        method(DEFAULT, BEST),
        at,
        what,
        seeds=3,
        data=EVERYWHERE,
        on_text=ON_TEXT,
        over_text=of_text,
    )
    bounded = replace(BEST, bound=0.12)
    what = "the default with a bound of 0.12 (now 0.13), which came after the other cells"
    yield Family(method(f"{DEFAULT}_bound", bounded), at, what, data=DATA[:-1])
    what = "the default at the rate that it is calibrated from"
    yield Family(method(f"{DEFAULT}_fixed", FIXED), at, what, data=DATA[:-1])
    tuned = method(f"{DEFAULT}_tuned", FIXED)
    yield Family(
        tuned,
        (-3, -2, -1),
        "the default at the best rate of a grid",
        data=EVERYWHERE,
        on_text=ON_TEXT,
    )
    for name, budget in (
        ("long", LONG_BUDGET),
        ("longest", LONGEST_BUDGET),
        ("short", BUDGET // 10),
    ):
        what = f"the default over {budget:,} forward passes"
        yield Family(method(f"{DEFAULT}_{name}", BEST, budget), at, what, data=DATA[:-1])
    for name, budget in (("", BUDGET), ("_long", LONG_BUDGET), ("_longest", LONGEST_BUDGET)):
        what, at = (
            f"the default as it was, with a cosine, over {budget:,}",
            (default_exponent(budget, schedule="cosine"),),
        )
        was = method(f"{DEFAULT}_cosine{name}", replace(COSINE, calibrate=True), budget)
        yield Family(was, at, what, seeds=1 if name else 3, data=DATA[:-1] if name else STYLES)


def _changed_defaults() -> Iterator[Family]:
    """One thing of the default at its fixed rate changed at a time; on two styles, one seed."""
    changes: dict[str, tuple[Phase, int, str]] = {
        "4_directions": (
            replace(FIXED, num_directions=4),
            8,
            "four directions of each of eight examples",
        ),
        "16_directions": (
            replace(FIXED, num_directions=16),
            2,
            "sixteen directions of each of two examples",
        ),
        "without_regions": (
            replace(FIXED, regions=1),
            BEST_BATCH,
            "without directions of each patch group",
        ),
    }
    for name, (phase, batch, what) in changes.items():
        method = _method(f"{DEFAULT}_{name}", phase, batch=batch)
        yield Family(method, (DEFAULT_EXPONENT,), f"the default, but {what}", data=TRIED_ON)
    held = _method(
        f"{DEFAULT}_held", replace(BEST, normalize="running", schedule="hold"), batch=BEST_BATCH
    )
    what, at = (
        "the default with running rms, its rate held",
        default_exponent(BUDGET, schedule="cosine"),
    )
    yield Family(held, (at,), what, data=STYLES)


def _antithetic() -> Iterator[Family]:
    """What was the default before: both sides of one direction of each of 16 examples, and what was
    changed of it.
    """
    was, calibrated = "antithetic", replace(ANTITHETIC, calibrate=True)
    at, halved = (
        (default_exponent(BUDGET, was, "cosine"),),
        {"on_text": ON_TEXT, "over_text": PICTURES_OVER_QUIET},
    )
    what = "both sides of one direction of each of 16 examples; else as the default"
    yield Family(_method(was, calibrated), at, what, seeds=3, data=EVERYWHERE, **halved)
    what = "the same at the rate that it is calibrated from"
    yield Family(_method(f"{was}_fixed", ANTITHETIC), at, what, seeds=3, data=STYLES)
    long_at = (default_exponent(LONG_BUDGET, was, "cosine"),)
    yield Family(
        _method(f"{was}_fixed_long", ANTITHETIC, budget=LONG_BUDGET),
        long_at,
        f"{what}, long",
        data=DATA[:-1],
    )
    yield Family(
        _method(f"{was}_long", calibrated, budget=LONG_BUDGET),
        long_at,
        "antithetic, long",
        data=DATA[:-1],
    )
    held = replace(calibrated, normalize="running", schedule="hold")
    yield Family(
        _method(f"{was}_held", held),
        at,
        "antithetic with running rms, its rate held",
        3,
        data=STYLES,
    )
    tuned = _method(f"{was}_tuned", ANTITHETIC)
    yield Family(
        tuned,
        (-3, -2, -1),
        "antithetic at the best rate of a grid",
        data=EVERYWHERE,
        on_text=ON_TEXT,
    )
    changes: dict[str, tuple[Phase, str]] = {
        "without_regions": (replace(ANTITHETIC, regions=1), "one direction an example"),
        "without_columns": (replace(ANTITHETIC, level="row"), "rows alone"),
        "without_rows": (replace(ANTITHETIC, level="column"), "columns alone"),
        "momentum": (replace(ANTITHETIC, optimizer="momentum"), "momentum"),
        "constant": (replace(ANTITHETIC, schedule="constant"), "a constant rate"),
        "logit_normal": (
            replace(ANTITHETIC, sigma="logit_normal"),
            "logit-normal noise levels in training",
        ),
        "eps_0.003": (replace(ANTITHETIC, eps=3e-3), "a smaller radius"),
        "eps_0.03": (replace(ANTITHETIC, eps=3e-2), "a larger radius"),
    }
    for name, (phase, what) in changes.items():
        yield Family(_method(f"{was}_{name}", phase), at, f"antithetic, but {what}", data=TRIED_ON)
    adam = _method(f"{was}_adam", replace(ANTITHETIC, optimizer="adam"))
    yield Family(adam, (-5, -4, -3), "antithetic, but Adam", data=TRIED_ON)
    columns = replace(ANTITHETIC, level="column", share=0.2, schedule="constant")
    coarse = _method(f"{was}_coarse_to_fine", columns, replace(ANTITHETIC, share=0.8))
    yield Family(coarse, at, "columns for a fifth, then antithetic", data=TRIED_ON)


def _alternatives() -> Iterator[Family]:
    """What came before; on two styles, one seed."""
    cosine = Phase("row", per_example=True, schedule="cosine")
    yield Family(
        _method("row_cosine", cosine),
        (-2,),
        "rows, a direction per example, SGD with cosine",
        seeds=3,
        data=TRIED_ON,
    )
    levels: tuple[Level, ...] = ("layer", "row", "column", "separable")
    for level in levels:
        numbers = "rows and columns" if level == "separable" else f"{level}s"
        shared, each = Phase(level), Phase(level, per_example=True)
        yield Family(
            _method(f"{level}_shared", shared),
            (-3, -2),
            f"{numbers}, one shared direction, SGD",
            data=TRIED_ON,
        )
        yield Family(
            _method(f"{level}_per_example", each),
            (-3, -2),
            f"{numbers}, a direction per example, SGD",
            data=TRIED_ON,
        )


REFERENCES = ("paper_relative", "paper_absolute")
FIRST_ORDER = "first_order_dense"  # its gain is what shares are shares of
FAMILIES = {family.name: family for family in _families()}


def best_exponent(final: Mapping[float, float]) -> float | None:
    """The rate with the lowest final loss; a run that diverged has an infinite one.

    None without any finite one.
    """
    finite = {exponent: loss for exponent, loss in final.items() if math.isfinite(loss)}
    return min(finite, key=lambda exponent: (finite[exponent], exponent)) if finite else None


def next_exponents(grid: Sequence[float], final: Mapping[float, float]) -> list[float]:
    """Rates that are still to run: those of the grid, then one beyond the edge that is best, until
    the best has both neighbours.
    """
    missing = [exponent for exponent in grid if exponent not in final]
    if missing or len(grid) <= 1:
        return missing
    best = best_exponent(final)
    if best is None:  # all diverged
        best = min(final)
    beyond = [exponent for exponent in (best - 1, best + 1) if exponent not in final]
    return beyond[:1] if len(final) < len(grid) + MOST_EXTENSIONS else []


def resolved_exponent(grid: Sequence[float], final: Mapping[float, float]) -> float | None:
    """The best rate once nothing of the grid is left to run."""
    return None if next_exponents(grid, final) else best_exponent(final)


FinalLosses = Mapping[str, float]
"""Name of a finished cell -> its last held-out loss, infinite where it diverged."""


def final_by_exponent(
    family: Family, data: str, final: FinalLosses, seed: int = 0
) -> dict[float, float]:
    tried = {*range(-24, 13), *family.exponents}
    names = {exponent: Cell(data, family.at(exponent, data), seed).name for exponent in tried}
    return {exponent: final[name] for exponent, name in names.items() if name in final}


def rate_of(family: Family, data: str, final: FinalLosses) -> float | None:
    """The exponent of the rate at which the family is compared; None while its grid is not
    finished.
    """
    source = FAMILIES[family.same_rate_as] if family.same_rate_as else family
    return resolved_exponent(source.exponents, final_by_exponent(source, data, final))


def open_cells(data: str, final: FinalLosses) -> list[Cell]:
    """The cells that can be run now, in the order of the table.

    More of them follow from the results of these.
    """
    cells: list[Cell] = []
    for family in FAMILIES.values():
        if data not in family.data:
            continue
        found = final_by_exponent(family, data, final)
        if not family.same_rate_as:
            cells += [
                Cell(data, family.at(exponent, data), 0)
                for exponent in next_exponents(family.exponents, found)
            ]
        best = rate_of(family, data, final)
        if best is not None:
            cells += [Cell(data, family.at(best, data), seed) for seed in range(family.seeds)]
    return [cell for cell in cells if cell.name not in final]
