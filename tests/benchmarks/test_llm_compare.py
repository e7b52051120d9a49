"""The comparison on language models: cells whose settings hold, arithmetic by hand, and one that is
stopped and goes on.
"""

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.llm_compare import cells as cells_module
from benchmarks.llm_compare.cells import _command, run_cell
from benchmarks.llm_compare.methods import METHODS, TASKS, Cell, Places, arguments_of, cells
from benchmarks.llm_compare.report import TABLE, report
from qzo_diffusion.cli import parse
from qzo_diffusion.commands.llm import TRAIN_FLAGS
from qzo_diffusion.config.files import resolve_settings
from qzo_diffusion.config.llm import LlmConfig
from qzo_diffusion.runs import build
from tests.tiny_llama import save_tiny_llama, write_sentences


@pytest.fixture
def places(tmp_path):
    return Places(
        tmp_path / "results", tmp_path / "cache", tmp_path / "data", tmp_path / "model", steps=3
    )


def test_the_settings_of_every_cell_are_valid(places):
    for cell in cells("*"):
        method = METHODS[cell.method]
        if method.trained:
            config = resolve_settings(
                parse(["llm", "train", *arguments_of(cell, places)]), None, TRAIN_FLAGS, LlmConfig
            )
            assert (config.train.seed, config.train.max_steps, config.data.batch_size) == (
                cell.seed,
                3,
                method.batch,
            )
            if not method.first_order:  # what the results say that was spent
                assert (
                    config.data.batch_size * build.probes_of_example(config)
                    == method.forwards_of_step
                    == 32
                )
    paper = resolve_settings(
        parse(["llm", "train", *arguments_of(Cell("sst2", "paper", 0), places)]),
        None,
        TRAIN_FLAGS,
        LlmConfig,
    )
    assert (paper.qzo.parametrization, paper.qzo.units, paper.qzo.directions) == (
        "dense",
        "absolute",
        "gaussian",
    )
    assert (paper.qzo.eps, paper.qzo.clip_threshold, paper.train.lr, paper.train.schedule) == (
        1e-3,
        100,
        1e-7,
        "constant",
    )


def test_seeds_and_patterns():
    assert [cell.name for cell in cells("sst2/default_*,rte/default_*")] == [
        "sst2/default_0",
        "sst2/default_1",
        "sst2/default_2",
        "rte/default_0",
    ]
    assert {cell.task for cell in cells("*")} == set(TASKS)


def written(places, method, seed, value, end, steps=3, curve=()):
    cell = Cell("sst2", method, seed)
    path = places.result(cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {
        "task": "sst2",
        "method": method,
        "seed": seed,
        "ended": "budget",
        "metric": "accuracy",
        "value": value,
    }
    path.write_text(
        json.dumps(
            facts
            | {
                "validation_loss": {"start": 1.5, "end": end},
                "steps": steps,
                "forwards": 96,
                "processor_seconds": 5.0,
                "curve": curve,
            }
        )
    )


def test_a_report_by_hand(places, tmp_path):
    written(places, "default", 0, 0.7, 0.7)
    written(places, "default", 1, 0.8, 0.5)
    # it overfits, and its best is what counts
    written(places, "fo_scales", 0, 0.9, 0.6, curve=[(0, 1.5), (48, 0.3), (96, 0.6)])
    document = tmp_path / "llm.md"
    document.write_text(f"before\n{TABLE[0]}\nold\n{TABLE[1]}\nafter\n")
    found = json.loads(report(places, document).read_text())
    assert found["gain_share"]["sst2"] == pytest.approx((1.5 - 0.6) / (1.5 - 0.3))
    default = found["tasks"]["sst2"]["default"]
    assert (default["accuracy"], default["accuracy_std"], default["runs"]) == (
        0.75,
        pytest.approx(0.0707, abs=1e-4),
        2,
    )
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| sst2 | default | accuracy | 0.750 ± 0.071 | 2 |" in text


@pytest.mark.slow
def test_a_cell_that_was_stopped_goes_on(places):
    save_tiny_llama(places.model)
    write_sentences(places.data / "sst2", train=1250, test=20)
    stop = threading.Event()
    stop.set()
    cell = Cell("sst2", "default", 0)
    assert run_cell(cell, places, stop) is None
    assert not places.result(cell).exists()
    result = run_cell(cell, places, threading.Event())
    assert result is not None
    assert (result["steps"], result["forwards"], result["ended"]) == (3, 96, "budget")
    assert 0 <= result["value"] <= 1
    assert json.loads(places.result(cell).read_text()) == json.loads(json.dumps(result))


@pytest.mark.parametrize("stopped", [False, True])
def test_an_evaluation_that_fails_is_no_cell_that_was_stopped(places, monkeypatch, stopped):
    monkeypatch.setattr(cells_module, "_call", lambda *_: (130 if stopped else 2, "", 1.0))
    stop = threading.Event()
    if stopped:
        stop.set()
        assert run_cell(Cell("sst2", "zero_shot", 0), places, stop) is None
    else:
        with pytest.raises(RuntimeError, match="exit code 2 of evaluate"):
            run_cell(Cell("sst2", "zero_shot", 0), places, stop)


def test_the_document_has_a_place_for_the_table():
    text = (Path(__file__).parents[2] / "docs" / "llm.md").read_text()
    assert text.index(TABLE[0]) < text.index(TABLE[1])


def test_another_dtype_replaces_the_methods_own_and_is_said(places):
    cell = Cell("sst2", "quzo_default", 0)
    given = arguments_of(cell, replace(places, dtype="float32"))
    config = resolve_settings(parse(["llm", "train", *given]), None, TRAIN_FLAGS, LlmConfig)
    assert config.compute.dtype == "float32"
    assert "compute.dtype=float32" not in arguments_of(cell, places)
    elsewhere = replace(places, dtype="float32", minutes=120)
    assert _command(cell, elsewhere).endswith("--dtype float32 --minutes 120")
    assert _command(cell, places).endswith("quzo_default_0'")
