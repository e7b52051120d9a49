"""Cells of the convergence benchmark: they follow from each other, and go on where they were."""

import json
import math
from dataclasses import replace

import pytest

from benchmarks.content.methods import changed
from benchmarks.convergence import adapters, cells, folder
from benchmarks.convergence.methods import FAMILIES, open_cells, reference, settled
from benchmarks.convergence.rates import next_exponents, rate
from benchmarks.convergence.results import loss_of
from qzo_diffusion.config.files import make_config
from tests.conftest import write_squares


def test_the_grid_grows_while_its_best_is_at_the_edge():
    grid = (-4, -3, -2)
    assert next_exponents(grid, {}) == [-4, -3, -2]
    assert next_exponents(grid, {-4: 1.0, -3: 0.9}) == [-2]
    assert next_exponents(grid, {-4: 1.0, -3: 0.9, -2: 0.95}) == []
    rising = {-4: 1.0, -3: 0.9, -2: 0.8}
    assert next_exponents(grid, rising) == [-1]
    assert next_exponents(grid, rising | {-1: math.inf}) == []
    assert next_exponents(grid, {-4: 0.5, -3: 0.9, -2: math.inf}) == [-5]
    assert next_exponents(grid, {-4: math.inf, -3: math.inf, -2: math.inf}) == [-5]
    endless = {exponent: -float(exponent) for exponent in range(-4, 5)}
    assert next_exponents(grid, endless) == []  # given up after six more
    assert [rate(exponent) for exponent in (-3, -2, 0)] == [0.0316, 0.1, 1.0]


def named(style, final):
    return {cell.name for _, cell, _ in open_cells(style, final)}


def finished(name, losses):
    """A grid of a family, by name of the cell."""
    family = FAMILIES[name]
    return {family.cell("openmoji", exponent, 0).name: loss for exponent, loss in losses.items()}


def test_cells_follow_from_finished_ones():
    first = named("openmoji", {})
    assert {"openmoji/paper_relative_0.1_500_0", "openmoji/default_500_2"} <= first
    assert "openmoji/paper_relative_0.1_500_1" not in first
    relative = finished("paper_relative", {-3: 2.8, -2: 2.6, -1: 2.7})
    assert settled(FAMILIES["paper_relative"], "openmoji", relative) == (True, -2)
    # which reference is the better one is not known yet
    assert "openmoji/paper_relative_0.1_500_1" not in named("openmoji", relative)
    both = relative | finished("paper_absolute", {-6: 2.9, -5: 2.85, -4: math.inf})
    assert reference("openmoji", both) == "paper_relative"
    then = named("openmoji", both)
    assert {"openmoji/paper_relative_0.1_500_1", "openmoji/paper_relative_0.1_500_2"} <= then
    assert not any("paper_absolute" in name for name in then)
    assert not both.keys() & then


def test_every_family_has_settings_that_the_package_takes():
    for family in FAMILIES.values():
        settings = {key: one for key, one in family.settings.items() if key != "adapters"}
        config = make_config(changed(settings, model="tiny"))
        two_sided = 2 if config.qzo.estimator == "antithetic" else 1
        passes = config.data.batch_size * config.qzo.num_directions * two_sided
        assert family.exact or family.passes_of_step == passes, family.name


def test_the_loss_that_counts_is_the_lowest_of_exact_gradients_alone():
    result = {"curve": [[0, 3.0], [160, 1.0], [320, 1.5]]}
    assert loss_of(FAMILIES["qlora"], result) == 1.0
    assert loss_of(FAMILIES["default"], result) == 1.5
    for curve in ([], [[0, 3.0], [32, None]], [[0, 3.0], [32, math.nan]]):
        assert loss_of(FAMILIES["default"], {"curve": curve}) == math.inf


@pytest.fixture
def squares(tmp_path):
    """So many pictures that a run holds out some."""
    folder = write_squares(tmp_path / "squares", [(12 * index, 0, 255) for index in range(20)])
    for index in range(20):
        (folder / f"{index}.txt").write_text(f"square {index}")
    return folder


@pytest.fixture
def short(monkeypatch, prompts):
    """Families four steps long at one rate, with two prompts; the small model has no directions of
    its own.
    """
    monkeypatch.setattr(adapters, "shipped_prompts", lambda *_: str(prompts))
    kept = {name: one for name, one in FAMILIES.items() if name != "first_order"}
    kept["subspace"] = replace(kept["default"], name="subspace")

    def quick(family):
        every = 4 if family.exact else 2
        settings = changed(family.settings, train__validate_every=every, sample__steps=2)
        settings = changed(settings, train__checkpoint_every=every * family.exact)
        return replace(family, settings=settings, steps=4, grid=family.grid[:1])

    families = {name: quick(one) for name, one in kept.items()}
    monkeypatch.setattr(folder, "FAMILIES", families)
    monkeypatch.setattr("benchmarks.convergence.rates.MOST_EXTENSIONS", 0)
    return families


@pytest.mark.usefixtures("small_tiny", "short")
def test_a_folder_of_ones_own_is_compared_and_goes_on_where_it_was(squares, tmp_path, monkeypatch):
    work = tmp_path / "work"
    found = folder.compare(squares, 4 * 32, 2, work)
    name = squares.name
    assert found["start"][name] > found["first_order"][name] > 0
    families = found["styles"][name]["families"]
    assert families["default"]["final_loss"]["seeds"] == 2
    assert families["qlora"]["final_loss"]["mean"] < found["start"][name]
    assert families["qlora"]["pictures"]["content"]["base"] != 0
    default = json.loads((work / "cells" / name / "default_4_0.json").read_text())
    calibration = 3 * 16  # three passes of each of sixteen examples
    assert [spent for spent, _ in default["curve"]] == [0, 64 + calibration, 128 + calibration]
    monkeypatch.setattr(cells, "run_cell", lambda *_: pytest.fail("ran a finished cell"))
    assert folder.compare(squares, 4 * 32, 2, work)["default"] == found["default"]
    (squares / "3.txt").write_text("another caption")
    with pytest.raises(ValueError, match="has other images or weights; give another work folder"):
        folder.compare(squares, 4 * 32, 2, work)


@pytest.mark.usefixtures("small_tiny", "short")
def test_a_folder_too_small_to_hold_out_some_is_refused(images, tmp_path):
    with pytest.raises(ValueError, match="a run holds out some of 20 different images"):
        folder.compare(images, 4 * 32, 1, tmp_path / "work")
    assert not (tmp_path / "work").exists()


@pytest.mark.usefixtures("small_tiny")
def test_a_run_that_diverges_has_no_curve_and_never_wins(squares, tmp_path):
    family = FAMILIES["paper_relative"]
    wild = replace(family, settings=changed(family.settings, train__lr=1e30), steps=12, grid=())
    bench = folder.bench_of(squares, tmp_path / "work")
    cell = wild.cell(squares.name, None, 0)
    result = cells.run_cell(bench, wild, cell, wild.settings, "a command")
    assert loss_of(wild, result) == math.inf
    # no NaN, which is not JSON
    json.loads(bench.result(cell).read_text(), parse_constant=pytest.fail)


@pytest.mark.usefixtures("small_tiny")
def test_a_run_that_is_stopped_is_no_result(squares, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.content.cells.training.run", lambda *_: {"stopped": True})
    family, bench = FAMILIES["default"], folder.bench_of(squares, tmp_path / "work")
    cell = family.cell(squares.name, None, 0)
    with pytest.raises(KeyboardInterrupt):
        cells.run_cell(bench, family, cell, family.settings, "a command")
    assert not bench.result(cell).exists()
