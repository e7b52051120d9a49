"""Cells of the convergence benchmark: they resume bit for bit, and follow from each other."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch

from benchmarks.convergence import cells
from benchmarks.convergence.cells import run_cell
from benchmarks.convergence.methods import (
    FAMILIES,
    next_exponents,
    open_cells,
    rate_of,
    resolved_exponent,
)
from benchmarks.convergence.results import final_losses
from benchmarks.convergence.settings import Phase
from tests.benchmarks.small_task import SmallTask, folders, small
from tests.quantized import inputs


def stop_after(calls):
    """True once it was asked that often, for ever."""
    left = iter(range(calls))
    return lambda: next(left, None) is None


METHODS = [
    "row_cosine",
    "paper_relative",
    "paper_absolute",
    "default",
    "antithetic_momentum",
    "antithetic_adam",
    "antithetic_coarse_to_fine",
    "first_order_row",
]


@pytest.mark.parametrize("name", [*METHODS, "first_order_dense", "qlora"])
def test_a_cell_that_was_stopped_ends_as_one_that_was_not(tmp_path, name, monkeypatch):
    monkeypatch.setattr(cells, "EVALUATIONS", 10)  # every third step
    # peft knows no other layers
    exponent, backend = (-6, "bnb") if name == "qlora" else (-4, "reference")
    cell = small(name, exponent, steps=32)
    whole, task = folders(tmp_path), SmallTask(backend)
    expected = run_cell(cell, task, whole)
    untouched = SmallTask(backend).scales.tensors()
    assert all(torch.equal(live, untouched[layer]) for layer, live in task.scales.tensors().items())
    assert not whole.checkpoint(cell).exists()

    parts, result, stops = folders(tmp_path, "parts"), None, 0
    while result is None:
        assert stops < 20
        result = run_cell(cell, SmallTask(backend), parts, stop_requested=stop_after(9 + stops))
        stops += 1
    assert stops > 3
    for key in ("curve", "final_loss", "start_loss", "steps", "settings", "ended"):
        assert result[key] == expected[key], key
    assert json.loads(parts.result(cell).read_text())["curve"] == [
        list(point) for point in expected["curve"]
    ]
    assert result["final_loss"] < result["start_loss"]


def test_adapters_are_taken_out_again_whatever_happens(tmp_path):
    task, cell = SmallTask("bnb"), small("qlora", -4)
    layers, x = dict(task.model.named_modules()), inputs()
    before = task.model(x)
    assert run_cell(cell, task, folders(tmp_path), stop_requested=stop_after(20)) is None
    assert dict(task.model.named_modules()) == layers
    assert torch.equal(task.model(x), before)
    task.batches = None
    with pytest.raises(TypeError):
        run_cell(cell, task, folders(tmp_path, "other"))
    assert dict(task.model.named_modules()) == layers
    once, again = (
        run_cell(cell, SmallTask("bnb"), folders(tmp_path, name))["curve"]
        for name in ("once", "again")
    )
    assert once == again
    assert once[-1][1] < 0.9 * once[0][1]


def test_evaluations_are_at_most_two_percent_apart(tmp_path):
    cell = small("row_cosine", -2, steps=130)
    spent = [x for x, _ in run_cell(cell, SmallTask(), folders(tmp_path))["curve"]]
    assert spent[0] == 0
    assert spent[-1] == cell.method.budget
    assert max(b - a for a, b in itertools.pairwise(spent)) <= 0.02 * cell.method.budget


def test_a_calibrated_rate_is_measured_once_and_paid_for(tmp_path):
    cell = small("default", -2, steps=20)
    place, result, stops = folders(tmp_path), None, 0
    while result is None:
        assert stops < 20
        result = run_cell(cell, SmallTask(), place, stop_requested=stop_after(9 + stops))
        stops += 1
    assert stops > 1
    assert 0 < result["rate_factor"] <= 1
    whole = run_cell(cell, SmallTask(), folders(tmp_path, "whole"))
    assert {key: whole[key] for key in ("rate_factor", "curve")} == {
        key: result[key] for key in ("rate_factor", "curve")
    }
    forwards = 3 * 16  # three of each of sixteen examples
    assert [spent for spent, _ in result["curve"]] == [
        0,
        *(forwards + 16 * step for step in range(1, 21)),
    ]
    assert result["curve"][-1][0] == cell.method.budget
    assert FAMILIES["default"].at(-2).steps == (16_000 - 48) // 32
    assert not FAMILIES["default"].phases("sst2")[0].calibrate


def test_a_checkpoint_of_other_settings_or_a_damaged_one_is_not_used(tmp_path):
    place, cell = folders(tmp_path), small("row_cosine", -2)
    assert run_cell(cell, SmallTask(), place, stop_requested=stop_after(20)) is None
    other = replace(cell, method=replace(cell.method, lr=0.05))
    fresh = cells.CellRun(other, SmallTask(), place.checkpoint(cell))
    assert fresh.progress.step == 0
    place.checkpoint(cell).write_bytes(place.checkpoint(cell).read_bytes()[:100])
    assert cells.CellRun(cell, SmallTask(), place.checkpoint(cell)).progress.step == 0


def test_a_cell_that_diverges_says_so_and_ends_early(tmp_path):
    cell = replace(small("paper_relative", 4), data="openmoji")
    result = run_cell(cell, SmallTask(), folders(tmp_path))
    assert result["ended"] == "diverged"
    assert result["final_loss"] is None
    assert result["steps"] < cell.method.steps
    assert final_losses({"a": result}) == {"a": math.inf}
    # no NaN, which is not JSON
    json.loads(folders(tmp_path).result(cell).read_text(), parse_constant=pytest.fail)


def test_phases_follow_each_other():
    method = replace(
        FAMILIES["antithetic_coarse_to_fine"].at(-2),
        phases=(Phase("layer", share=0.2), Phase("row", share=0.8)),
    )
    assert method.steps == 500
    assert method.ends() == [100, 500]
    assert replace(method, first_order=True).steps == 1000


def test_the_grid_grows_while_its_best_is_at_the_edge():
    grid = (-4, -3, -2)
    assert next_exponents(grid, {}) == [-4, -3, -2]
    assert next_exponents(grid, {-4: 1.0, -3: 0.9}) == [-2]
    assert resolved_exponent(grid, {-4: 1.0, -3: 0.9, -2: 0.95}) == -3
    rising = {-4: 1.0, -3: 0.9, -2: 0.8}
    assert next_exponents(grid, rising) == [-1]
    assert resolved_exponent(grid, rising) is None
    assert resolved_exponent(grid, rising | {-1: math.inf}) == -2
    assert next_exponents(grid, {-4: 0.5, -3: 0.9, -2: math.inf}) == [-5]
    assert next_exponents(grid, {-4: math.inf, -3: math.inf, -2: math.inf}) == [-5]
    endless = {exponent: -float(exponent) for exponent in range(-4, 5)}
    assert next_exponents(grid, endless) == []  # given up after six more
    assert next_exponents((-2,), {-2: 1.0}) == []


def test_cells_follow_from_finished_ones():
    names = [cell.name for cell in open_cells("openmoji", {})]
    assert len(names) == len(set(names))
    assert not any("_long" in name and "paper" in name for name in names)
    assert "openmoji/paper_relative_lr0.01_1" not in names
    final = {f"openmoji/paper_relative_lr{lr}_0": loss for lr, loss in _GRID.items()}
    assert rate_of(FAMILIES["paper_relative"], "openmoji", final) == -4
    then = [cell.name for cell in open_cells("openmoji", final)]
    assert {"openmoji/paper_relative_lr0.01_1", "openmoji/paper_relative_lr0.01_2"} <= set(then)
    assert "openmoji/paper_relative_long_lr0.01_0" in then
    assert not final.keys() & set(then)


_GRID = {"0.00316": 2.8, "0.01": 2.6, "0.0316": 2.7, "0.1": 2.8, "0.316": math.inf}
