"""The comparison's file and tables, by hand."""

import json

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.comparison import report, states
from benchmarks.record import update_results


def write(path, **facts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts))


def result(accuracy):
    return {
        "value": accuracy,
        "validation_loss": {"start": 1.2, "end": 0.5},
        "forwards": 8000,
        "processor_seconds": 120,
    }


def test_figures_come_from_the_files_of_each_benchmark(tmp_path):
    cells = tmp_path / "cells"
    for seed, accuracy in enumerate((0.8, 0.9)):
        write(cells / "llm" / "sst2" / f"default_{seed}.json", **result(accuracy))
    write(cells / "llm" / "sst2" / "default_part_0.json", **result(0.1))  # of another method
    for name in ("lsq", "grass"):
        write(cells / "rivals" / "sst2" / f"{name}_0.json", **result(0.7))
    first = {"inference_mb": 200, "memory_over_inference": 6.0}
    write(
        tmp_path / "llm_memory.json",
        methods={"default": {"memory_over_inference": 1.004}} | {"fo_scales": first},
    )
    own = {"step_mb": 2000, "memory_over_inference": 5.0}
    write(tmp_path / "rivals_memory.json", methods={"lsq": own, "grass": own})
    update_results("comparison", "others", {"states": {}, "rotations": {}}, {}, tmp_path)
    document = tmp_path / "comparison.md"
    document.write_text("".join(f"{a}old{b}" for a, b in report.MARKERS.values()))
    found = json.loads(report.report(tmp_path, document).read_text())
    assert found["states"] == {}
    table = found["sst2"]
    assert list(table) == ["qzo", "lsq", "grass"]
    assert table["qzo"]["accuracy"] == pytest.approx(0.85)
    assert [one["memory_over_inference"] for one in table.values()] == [1.004, 10.0, 5.0]
    text = document.read_text()
    assert "old" not in text
    assert (
        "| `lsq` | weights and step sizes of int4 | 0.700 | 10.00 | 8,000 | 0.500 | 1 | 2 |" in text
    )


def test_rows_of_rotations_show_what_is_measured():
    ran = {"validation_loss": {"start": 1.2, "end": 0.9}, "accuracy": {"start": 0.5, "end": 0.6}}
    measured = {"w4a16": 30.0, "w4a4": 16025.6}
    rows = {"none": measured, "hadamard": measured | {"sst2": ran}, "kurtail": {"sst2": ran}}
    table = report.tables({"rotations": rows})["rotations"].splitlines()
    assert "| `none` | 30.0 | 16,025.6 | - | - |" in table
    assert "| `hadamard` | 30.0 | 16,025.6 | 1.200 -> 0.900 | 0.500 -> 0.600 |" in table
    assert "| `kurtail` | - | - | 1.200 -> 0.900 | 0.500 -> 0.600 |" in table


def test_shares_are_of_the_32_bit_runs_gain_and_bytes(tmp_path):
    for bits, (loss, count) in zip(
        states.BITS, [(1.0, 1000), (1.0, 250), (1.1, 130), (1.2, 100), (1.5, 70)], strict=True
    ):
        folder = tmp_path / f"{bits}_bits"
        (folder / "final").mkdir(parents=True)
        checkpoint = folder / "checkpoints" / "step_000200"
        checkpoint.mkdir(parents=True)
        save_file({"first": torch.zeros(count, dtype=torch.uint8)}, checkpoint / states.STATE)
        lines = [{"step": 0, "validation_loss": 2.0}, {"step": 0, "loss": 3.0}]
        lines += [{"step": 200, "validation_loss": loss}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    found = states.measure(tmp_path)
    assert list(found) == ["32", "8", "4", "3", "2"]
    assert [one["gain_share"] for one in found.values()] == pytest.approx([1, 1, 0.9, 0.8, 0.5])
    assert [one["memory_ratio"] for one in found.values()] == [1, 0.25, 0.13, 0.1, 0.07]
