"""The convergence benchmark's report: arithmetic by hand, and missing cells named."""

import json

import pytest

from benchmarks.convergence import figures, methods, report, settings
from benchmarks.convergence.methods import (
    FAMILIES,
)
from benchmarks.convergence.results import finished, to_json
from benchmarks.convergence.settings import UNSEEN, Cell


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
