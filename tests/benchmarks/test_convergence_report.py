"""The convergence benchmark's report: arithmetic by hand, and cells that are not there."""

import json

import pytest

from benchmarks.convergence import figures, report
from benchmarks.convergence.methods import FAMILIES
from benchmarks.convergence.results import recorded, results_in


def test_interpolation_between_evaluations():
    curve = [(0, 3.0), (320, 2.0), (640, 2.5), (960, 1.0)]
    assert figures.crossing(curve, 2.0) == 320
    assert figures.crossing(curve, 2.25) == 240
    assert figures.crossing(curve, 1.6) == pytest.approx(640 + 320 * 0.9 / 1.5)
    assert figures.crossing(curve, 0.5) is None
    assert figures.crossing(curve, 3.0) == 0
    assert figures.crossing([(0, 3.0), (320, None)], 1.0) is None


def test_ratios_by_hand():
    curves = {0: [(0, 3.0), (1000, 1.0)], 2: [(0, 3.0), (2000, 1.0)]}  # 2.0 after 500 and 1000
    assert figures.budget_ratio(curves, {0: 2.0, 1: 9.0, 2: 2.0}, 16_000) == {
        "mean": 16_000 / 750,
        "low": 16.0,
        "high": 32.0,
        "seeds": 2,
    }
    # each seed has the target of its own noise: 1.0 after 1000, 2.0 after 1000
    own = figures.budget_ratio(curves, {0: 1.0, 2: 2.0}, 16_000)
    assert own["mean"] == own["low"] == own["high"] == 16.0
    assert figures.budget_ratio(curves, {0: 2.0, 2: 0.5}, 16_000) is None  # never gets there
    assert figures.budget_ratio(curves, {0: 3.5, 2: 3.5}, 16_000) is None  # nothing to reach
    assert figures.budget_ratio(curves, {1: 2.0}, 16_000) is None  # no seed in both
    assert figures.geometric_mean([4.0, 25.0]) == pytest.approx(10.0)


def write(work, family, exponent, seed, curve, pictures=None, inputs="these images"):
    curve = [*curve[:-1], [FAMILIES[family].passes(FAMILIES[family].steps), curve[-1][1]]]
    one = FAMILIES[family]
    cell, settings = one.cell("fluent_mono", exponent, seed), one.at(exponent)[1]
    result = {
        "cell": cell.name,
        "family": family,
        "lr": settings["train"]["lr"],
        "seed": seed,
        "settings": settings,
        "inputs": inputs,
        "curve": curve,
        "pictures": pictures,
        "seconds": 2.0,
        "provenance": {"date": "2026-01-01", "command": "a command", "threads": "1"}
        | {"machine": {"processor": "a processor", "cores": 2}},
    }
    path = work / "cells" / f"{cell.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))
    return path


@pytest.fixture
def written(tmp_path):
    """Writes the report of `work`; returns figures and document."""
    document = tmp_path / "convergence.md"
    document.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")

    def of(work):
        picture, cells = tmp_path / "plot.png", tmp_path / "recorded.json"
        found = report.write_report(work, tmp_path, document, picture, cells)
        assert picture.stat().st_size > 1000
        return found, document.read_text()

    return of


def test_a_report_of_nothing_says_so(tmp_path, written):
    found, text = written(tmp_path / "work")
    assert text.startswith("before\n")
    assert text.endswith(f"{report.END}\nafter\n")
    assert "old" not in text
    assert text.count("No cell is finished.") == len(report.STYLES)
    assert found["default_ratio"]["missing"] == list(report.STYLES)
    assert list(found["speedup"]) == ["sst2"]


def write_references(work, finals):
    for seed in range(3):
        curve = [[0, 3.0 + seed], [16_000, finals[0] + seed]]
        write(work, "paper_relative", -2, seed, curve)
    for exponent in (-3, -1):
        write(work, "paper_relative", exponent, 0, [[0, 3.0], [16_000, finals[1]]])
    for exponent, final in ((-6, 2.99), (-5, 2.98), (-4, None)):
        write(work, "paper_absolute", exponent, 0, [[0, 3.0], [16_000, final]])


def test_a_report_of_some_cells(tmp_path, written):
    work = tmp_path / "work"
    write_references(work, (2.6, 2.9))
    for seed in range(2):  # each with the noise of its own seed
        curve = [[0, 3.0 + seed], [320, 2.8 + seed], [640, 2.4 + seed], [16_000, 2.0 + seed]]
        write(work, "subspace", None, seed, curve)
    found, text = written(work)
    style = found["styles"]["fluent_mono"]
    assert style["reference"] == "paper_relative"
    ours = style["families"]["subspace"]
    # without the exact gradient nothing says whether the reference trained
    assert ours["times_fewer_passes"] is ours["share_of_exact_gain"] is None
    pictures = {
        key: {"base": 0.5, "tuned": 0.6, "delta_ci95": [0.05, 0.15]} for key in ("style", "content")
    }
    write(work, "first_order_dense", -4, 0, [[0, 3.0], [800, 1.0], [1600, 1.2]], pictures)
    found, text = written(work)
    ours = found["styles"]["fluent_mono"]["families"]["subspace"]
    assert ours["times_fewer_passes"]["mean"] == pytest.approx(16_000 / 480)
    assert ours["share_of_exact_gain"]["mean"] == pytest.approx(0.5)
    assert found["speedup"]["fluent_mono"] == pytest.approx(16_000 / 480)
    assert found["first_order"]["fluent_mono"] == 1.0  # the lowest, not the last
    assert found["reference_gain_share"]["fluent_mono"] == pytest.approx(0.2)
    # as with the noise of the first seed
    assert found["paper"]["fluent_mono"] == pytest.approx(2.6)
    assert "| subspace | 0.1 | 2 | 2.0000 (2.0000 to 2.0000) | 50% (50% to 50%) | 33.3" in text
    assert "| +0.100 (+0.050 to +0.150) | +0.100 (+0.050 to +0.150) |" in text


def test_a_reference_that_did_not_train_is_no_yardstick(tmp_path, written):
    work = tmp_path / "work"
    write_references(work, (2.95, 2.96))
    write(work, "subspace", None, 0, [[0, 3.0], [16_000, 2.0]])
    write(work, "first_order_dense", -4, 0, [[0, 3.0], [1600, 1.0]])
    found, text = written(work)
    assert "fluent_mono" not in found["speedup"]
    assert "| the reference did not train |" in text
    assert "missing or not reached: fluent_mono, fluent3d, openmoji" in text
    assert found["gain_share"]["fluent_mono"] == pytest.approx(0.5)


def test_cells_are_recorded_and_go_on_counting_without_their_folder(tmp_path, written):
    work = tmp_path / "work"
    write(work, "default", None, 0, [[0, 3.0], [16_000, 2.0]])
    first, _ = written(work)
    again, _ = written(tmp_path / "nothing")
    assert again["styles"] == first["styles"]
    assert list(recorded(tmp_path / "recorded.json")) == ["fluent_mono/default_500_0"]


def test_pictures_that_were_judged_stay_and_other_images_are_refused(tmp_path, written):
    pictures = {key: {"base": 0, "tuned": 1, "delta_ci95": [0, 2]} for key in ("style", "content")}
    write(tmp_path / "judged", "default", None, 0, [[0, 3.0], [1, 2.0]], pictures)
    written(tmp_path / "judged")
    write(tmp_path / "again", "default", None, 0, [[0, 3.0], [1, 2.0]])
    found, _ = written(tmp_path / "again")
    assert found["styles"]["fluent_mono"]["families"]["default"]["pictures"] == pictures
    write(tmp_path / "other", "default", None, 1, [[0, 3.0], [1, 2.0]], inputs="other images")
    with pytest.raises(ValueError, match=r"default_500_\d has other images"):
        written(tmp_path / "other")


def test_a_part_of_a_run_and_results_of_other_settings_do_not_count(tmp_path):
    path = write(tmp_path, "paper_relative", -2, 0, [[0, 3.0], [16_000, 2.0]])
    assert list(results_in(tmp_path)) == ["fluent_mono/paper_relative_0.1_500_0"]
    path.write_text(path.read_text().replace('"eps": 0.01', '"eps": 0.5'))
    assert results_in(tmp_path) == {}
    path = write(tmp_path, "default", None, 0, [[0, 3.0], [16_048, 2.0]])
    path.write_text(path.read_text().replace("16048", "1648"))
    assert results_in(tmp_path) == {}
