"""The convergence benchmark: cells that resume bit for bit, arithmetic by hand, grids that grow,
and honest reports.
"""

import itertools
import json
import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.convergence import cells, figures, folder, methods, pictures, report, settings
from benchmarks.convergence.cells import Folders, run_cell
from benchmarks.convergence.methods import (
    FAMILIES,
    next_exponents,
    open_cells,
    rate_of,
    resolved_exponent,
)
from benchmarks.convergence.results import final_losses, finished, to_json
from benchmarks.convergence.settings import UNSEEN, Cell, Phase
from benchmarks.convergence.tasks import (
    STYLE_WORDS,
    choose,
    open_style,
    stratified_sigmas,
    write_images,
)
from benchmarks.tiny.drawings import taught_concepts
from qzo_diffusion.core.probing import StepBatch
from qzo_diffusion.quant.load import handles_of
from tests.quantized import inputs, scaled_network, squared_output


class SmallTask:
    """Two quantized linears whose output is to vanish."""

    def __init__(self, backend="reference"):
        self.model, self.scales = scaled_network(backend)
        self.held_out = [inputs(8, seed=99)]
        self.token_wise = ["0"]

    def objective(self, micro_batch):
        return squared_output(self.model)(micro_batch)

    def batches(self, seed, batch, patch_groups, sigma):
        return lambda step: StepBatch([inputs(batch, seed=1000 * seed + step)])

    def handles(self) -> Iterable:
        return handles_of(self.model)


def small(name, exponent, steps=50, **changes):
    """A cell of the table's method `name` with fewer examples."""
    method = replace(FAMILIES[name].at(exponent), batch=2, **changes)
    return Cell(
        "fluent_mono", replace(method, budget=steps * method.cost_of_step + method.calibration), 3
    )


def folders(tmp_path, name="one"):
    return Folders(tmp_path / name / "results", tmp_path / name / "cache")


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


def test_interpolation_between_evaluations():
    curve = [(0, 3.0), (320, 2.0), (640, 2.5), (960, 1.0)]
    assert figures.crossing(curve, 2.0) == 320
    assert figures.crossing(curve, 2.25) == 240
    assert figures.crossing(curve, 1.6) == pytest.approx(640 + 320 * 0.9 / 1.5)
    assert figures.crossing(curve, 0.5) is None
    assert figures.crossing(curve, 3.0) == 0
    assert figures.crossing([(0, 3.0), (320, None)], 1.0) is None


def test_ratios_by_hand():
    curves = [[(0, 3.0), (1000, 1.0)], [(0, 3.0), (2000, 1.0)]]  # 2.0 after 500 and 1000
    assert figures.budget_ratio(curves, 2.0, 16_000) == {
        "mean": 16_000 / 750,
        "low": 16.0,
        "high": 32.0,
        "seeds": 2,
    }
    # one seed never gets there
    assert figures.budget_ratio([*curves, [(0, 3.0), (1000, 2.5)]], 2.0, 16_000) is None
    assert figures.budget_ratio(curves, 3.5, 16_000) is None  # nothing to reach
    assert figures.geometric_mean([4.0, 25.0]) == pytest.approx(10.0)
    assert figures.share_of_gain(3.0, 2.5, 1.0) == 0.25


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


def _write(folder, data, family, exponent, seed, curve):
    method = FAMILIES[family].at(exponent, data)
    result = {
        "cell": Cell(data, method, seed).name,
        "data": data,
        "seed": seed,
        "settings": method.settings(),
        "unit": "example-forwards",
        "ended": "budget" if curve[-1][1] is not None else "diverged",
        "start_loss": curve[0][1],
        "final_loss": curve[-1][1],
        "seconds": {"train": 1.0, "evaluate": 1.0, "processor": 2.0},
        "curve": curve,
        "provenance": {"machine": {"processor": "a processor", "cores": 2}, "threads": "1"},
    }
    path = folder / "cells" / f"{result['cell']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json(result))


def test_what_is_other_on_text_still_counts_as_the_settings_of_the_table(tmp_path):
    for family, exponent in (("default", methods.DEFAULT_EXPONENT), ("paper_relative", -5)):
        _write(tmp_path, settings.TEXT, family, exponent, 0, [(0, 1.5), (16_000, 0.6)])
        result = next((tmp_path / "cells" / settings.TEXT).glob(f"{family}*"))
        assert list(finished(tmp_path / "cells")) == [f"{settings.TEXT}/{result.stem}"]
        result.write_text(result.read_text().replace('"eps": 0.0', '"eps": 0.7'))
        assert not finished(tmp_path / "cells")
        result.unlink()


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "convergence.md"
    path.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    return path


def test_a_report_of_nothing_says_that_all_is_missing(tmp_path, document):
    found = report.write_report(tmp_path, document, tmp_path / "plot.png")
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith(f"{report.END}\nafter\n")
    assert "old" not in text
    assert "not measured yet" in text
    assert text.count("No cell is finished.") == len(settings.DATA)
    nothing = {
        "geometric_mean": None,
        "styles": [],
        "missing": list(settings.DATA),
        "provisional_because": [],
    }
    assert found["default_ratio"] == nothing
    assert "openmoji: no cell is finished" in found["missing"]


def test_a_report_of_some_cells(tmp_path, document):
    for exponent, final in zip((-5, -4, -3, -2, -1), (2.9, 2.8, 2.6, 2.7, None), strict=True):
        _write(tmp_path, "fluent_mono", "paper_relative", exponent, 0, [(0, 3.0), (16_000, final)])
    _write(
        tmp_path,
        "fluent_mono",
        "default",
        methods.DEFAULT_EXPONENT,
        0,
        [(0, 3.0), (320, 2.8), (640, 2.4), (16_000, 2.0)],
    )
    found = report.write_report(tmp_path, document, tmp_path / "plot.png")
    style = found["styles"]["fluent_mono"]
    assert style["reference"] == "paper_relative"
    assert style["target_loss"] == 2.6
    assert style["reference_trained"] is None
    default = style["families"]["default"]
    assert default["budget_to_reach_ratio"]["mean"] == pytest.approx(16_000 / 480)
    assert default["share_of_first_order_gain"] is None
    assert found["default_ratio"]["geometric_mean"] == pytest.approx(16_000 / 480)
    assert found["default_ratio"]["missing"] == ["openmoji", "fluent3d", "sst2"]
    assert "fluent_mono: paper_relative: 1 of 3 seeds finished" in found["missing"]
    assert (
        "fluent_mono: default: 1 of 3 seeds finished"
        in found["default_ratio"]["provisional_because"]
    )
    assert "This is provisional: " in document.read_text()
    assert found["speedup"] == {"fluent_mono": pytest.approx(16_000 / 480)}
    assert (found["start"], found["paper"], found["default"]) == (
        {"fluent_mono": 3.0},
        {"fluent_mono": 2.6},
        {"fluent_mono": 2.0},
    )
    assert found["gain_share"] == found["first_order"] == found["default_gain_over_tuned"] == {}
    assert any(
        "antithetic_adam: not run at rate 0.00316" in sentence for sentence in found["missing"]
    )

    _write(
        tmp_path, "fluent_mono", "first_order_dense", -3, 0, [(0, 3.0), (1600, 1.0), (3200, 1.2)]
    )
    style = report.write_report(tmp_path, document, tmp_path / "plot.png")["styles"]["fluent_mono"]
    assert style["first_order_loss"] == 1.0  # the lowest, not the last
    assert style["families"]["default"]["share_of_first_order_gain"]["mean"] == pytest.approx(0.5)
    assert style["reference_trained"] is True
    assert "| default | 0.1 | 1 | 2.0000 | 50.0% | 33.3 | 2 |" in document.read_text()
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_the_default_is_compared_with_its_best_rate_and_over_the_long_budget(tmp_path, document):
    for exponent, final in zip((-3, -2, -1), (2.2, 1.8, 1.9), strict=True):
        _write(tmp_path, UNSEEN, "default_tuned", exponent, 0, [(0, 3.0), (16_000, final)])
    _write(
        tmp_path,
        UNSEEN,
        "default",
        methods.DEFAULT_EXPONENT,
        0,
        [(0, 3.0), (16_000, 1.92)],
    )
    _write(tmp_path, "openmoji", "first_order_dense", -3, 0, [(0, 3.0), (3200, 1.0)])
    exponent = methods.default_exponent(settings.LONG_BUDGET)
    _write(tmp_path, "openmoji", "default_long", exponent, 0, [(0, 3.0), (64_000, 1.5)])
    found = report.write_report(tmp_path, document, tmp_path / "plot.png")
    assert found["default_gain_over_tuned"] == {UNSEEN: pytest.approx(0.9)}
    assert found["gain_share"] == {"openmoji": pytest.approx(0.75)}
    assert f"| {UNSEEN} |  |  |  |  |  |  |  | 0.90 |" in document.read_text()


def test_a_reference_that_did_not_train_is_no_yardstick(tmp_path, document):
    for exponent, final in zip((-5, -4, -3, -2, -1), (2.99, 2.98, 2.97, 2.98, 2.99), strict=True):
        _write(tmp_path, "fluent3d", "paper_relative", exponent, 0, [(0, 3.0), (16_000, final)])
    _write(tmp_path, "fluent3d", "default", methods.DEFAULT_EXPONENT, 0, [(0, 3.0), (16_000, 2.0)])
    _write(tmp_path, "fluent3d", "first_order_dense", -3, 0, [(0, 3.0), (3200, 1.0)])
    found = report.write_report(tmp_path, document, tmp_path / "plot.png")
    assert found["styles"]["fluent3d"]["reference_trained"] is False
    assert found["styles"]["fluent3d"]["families"]["default"]["budget_to_reach_ratio"] is None
    assert "| reference did not train |" in document.read_text()


def test_results_of_other_settings_do_not_count(tmp_path):
    _write(tmp_path, "fluent_mono", "row_cosine", -2, 0, [(0, 3.0), (16_000, 2.0)])
    assert list(finished(tmp_path / "cells")) == ["fluent_mono/row_cosine_lr0.1_0"]
    path = tmp_path / "cells/fluent_mono/row_cosine_lr0.1_0.json"
    result = json.loads(path.read_text())
    result["settings"]["phases"][0]["eps"] = 0.5
    path.write_text(json.dumps(result))
    assert finished(tmp_path / "cells") == {}


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    """The archive with ten taught concepts, one of them drawn as another one, and two unknown
    ones.
    """
    folder = tmp_path_factory.mktemp("drawings")
    names = ["not taught", *taught_concepts()[:10], "nor this"]
    pixels = np.random.Generator(np.random.Philox(0)).integers(
        0, 256, (12, 64, 64, 3), dtype=np.uint8
    )
    pixels[4] = pixels[3]
    np.savez(folder / "emoji64.npz", img_openmoji=pixels, ok_openmoji=np.arange(12) != 5)
    (folder / "meta.json").write_text(json.dumps([{"name": name} for name in names]))
    return folder


def test_the_choice_of_drawings_is_fixed_and_disjoint(drawings):
    train, held_out = choose("openmoji", drawings, train=3, held_out=5)
    again = choose("openmoji", drawings, train=3, held_out=5)
    assert (train.names, held_out.names) == (again[0].names, again[1].names)
    assert torch.equal(train.images, again[0].images)
    assert len(train) == 3
    assert len(held_out) == 5
    both = train.names + held_out.names
    assert len(set(both)) == 8
    assert set(both) <= set(taught_concepts())
    assert taught_concepts()[4] not in both  # ok_openmoji is False
    assert len({image.numpy().tobytes() for image in [*train.images, *held_out.images]}) == 8
    assert train.captions[0] == f"{train.names[0]}, {STYLE_WORDS['openmoji']}"
    with pytest.raises(ValueError, match="9 are needed"):
        choose("openmoji", drawings, train=4, held_out=5)


def test_images_are_written_once(drawings, tmp_path):
    train, held_out = choose("openmoji", drawings, train=3, held_out=5)
    folder = write_images(tmp_path, train)
    assert len(list(folder.glob("*.png"))) == 3
    assert [
        json.loads(line)["text"] for line in (folder / "metadata.jsonl").read_text().splitlines()
    ] == train.captions
    assert write_images(tmp_path, train) == folder
    assert write_images(tmp_path, held_out) != folder


def test_noise_levels_cover_all_slices():
    sigmas = stratified_sigmas(4, 0)
    assert sorted(sigmas.tolist()) == [0.125, 0.375, 0.625, 0.875]
    assert torch.equal(sigmas, stratified_sigmas(4, 0))


def test_a_style_on_the_embedded_model(drawings, tmp_path, monkeypatch):
    task = open_style("openmoji", drawings, tmp_path, train=3, held_out=5)
    assert sum(map(len, task.held_out)) == 5
    batches = [task.batches(seed, 2, 4, "uniform")(0).micro_batches[0] for seed in (0, 0, 1)]
    assert torch.equal(batches[0].noise, batches[1].noise)
    assert not torch.equal(batches[0].noise, batches[2].noise)
    result = run_cell(small("row_cosine", -2, steps=2), task, folders(tmp_path))
    assert [spent for spent, _ in result["curve"]] == [0, 4, 8]
    before = {name: live.clone() for name, live in task.scales.tensors().items()}
    monkeypatch.setattr(pictures, "COUNT", 2)
    both = {
        "tuned": small("default", -1, steps=2),
        "first order": small("first_order_dense", -3, steps=2),
    }
    target, checkpoints = tmp_path / "styles.png", tmp_path / "runs"
    assert not pictures.draw(task, both, checkpoints, target, lambda: True)
    assert not target.exists()
    assert pictures.draw(task, both, checkpoints, target, lambda: False)
    drawn = Image.open(target)
    assert (
        len(
            {
                drawn.crop((128 * column, 16, 128 * column + 128, 144)).tobytes()
                for column in range(4)
            }
        )
        == 4
    )
    assert all(torch.equal(live, before[name]) for name, live in task.scales.tensors().items())
    monkeypatch.setattr(
        pictures.CellRun, "advance", lambda *_: pytest.fail("trained what is in a checkpoint")
    )
    assert pictures.draw(task, both, checkpoints, tmp_path / "again.png", lambda: False)
    assert Image.open(tmp_path / "again.png").tobytes() == drawn.tobytes()


def test_the_best_finished_runs_of_a_style_are_drawn(tmp_path):
    def finish(family, exponent, seed, loss):
        cell = Cell("openmoji", FAMILIES[family].at(exponent), seed)
        path = tmp_path / f"{cell.name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            json.dumps(
                {
                    "cell": cell.name,
                    "data": cell.data,
                    "settings": cell.method.settings(),
                    "final_loss": loss,
                }
            )
        )
        return cell

    finish("first_order_dense", -3, 0, 0.9)
    assert pictures.best_cells("openmoji", tmp_path) == {}
    finish("default", methods.DEFAULT_EXPONENT, 0, 1.2)
    short = finish("default", methods.DEFAULT_EXPONENT, 1, 1.1)
    exact = finish("first_order_dense", -2, 0, 0.8)
    assert pictures.best_cells("openmoji", tmp_path) == {"tuned": short, "first order": exact}
    longest = finish("default_longest", methods.default_exponent(settings.LONGEST_BUDGET), 0, 1.15)
    assert pictures.best_cells("openmoji", tmp_path)["tuned"] == longest
    assert pictures.best_cells("fluent3d", tmp_path) == {}


def test_a_folder_of_ones_own_is_compared_and_goes_on_where_it_was(tmp_path, monkeypatch):
    opened, ran = [], []
    original = folder.run_cell
    monkeypatch.setattr(
        folder, "StyleTask", lambda *arguments: opened.append(arguments) or SmallTask()
    )
    monkeypatch.setattr(
        folder,
        "run_cell",
        lambda cell, *rest, **options: ran.append(cell.name) or original(cell, *rest, **options),
    )
    monkeypatch.setattr(methods, "FIRST_ORDER_STEPS", 5)
    first = folder.compare(tmp_path / "mine", 4 * 32, 2, tmp_path / "work", tmp_path / "cache")
    assert first["start"]["mine"] > first["default"]["mine"] > 0
    assert first["gain_share"]["mine"] > 0
    assert {f"mine/default_lr0.1_{seed}" for seed in (0, 1)} <= first["curves"].keys()
    # of 4 * 32
    assert all(
        curve[-1][0] == 3 * 16 + 2 * 32
        for name, curve in first["curves"].items()
        if "default" in name
    )
    before = len(ran)
    again = folder.compare(tmp_path / "mine", 4 * 32, 2, tmp_path / "work", tmp_path / "cache")
    assert len(ran) == before
    assert again["default"] == first["default"]
