"""The benchmark of busy machines: its cells, its ratios, and the file that it shares."""

import json
import sys

import pytest

from benchmarks import busy, record


def test_ratios_are_of_cells_of_the_same_round_and_the_order_turns(monkeypatch, tmp_path):
    order = []
    speed = {("idle", "before"): 0.1, ("idle", "now"): 0.102, ("busy", "before"): 0.6}
    speed["busy", "now"] = 0.2
    running = []

    def spinning(processes):
        running[:] = [processes]
        return busy.contextlib.nullcontext()

    def step_seconds(code, steps, cores):
        state = "busy" if running[0] else "idle"
        name = "now" if code == busy.HERE else "before"
        order.append((state, name))
        drift = 1 + 0.5 * (len(order) > 4)  # the machine is slower in the second round
        return speed[state, name] * drift

    monkeypatch.setattr(busy, "spinning", spinning)
    monkeypatch.setattr(busy, "step_seconds", step_seconds)
    monkeypatch.setattr(busy, "commit", lambda code: "abc")
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(busy, "update_results", lambda *a: record.update_results(*a, tmp_path))
    monkeypatch.setattr(sys, "argv", ["busy", "--before", str(tmp_path), "--rounds", "2"])
    (tmp_path / "everyday.json").write_text('{"fo_plan_error": 0.01, "parts": {"plan": {}}}')
    busy.main()
    found = json.loads((tmp_path / "everyday.json").read_text())
    assert found["busy_speedup"] == pytest.approx(3)
    assert found["idle_ratio"] == pytest.approx(1.02)
    assert found["fo_plan_error"] == 0.01
    assert set(found["parts"]) == {"plan", "busy"}
    assert found["parts"]["busy"]["before"] == "abc"
    assert {"command", "date", "machine", "versions", "git_revision"} <= set(found["parts"]["busy"])
    assert order[0] == ("idle", "before")
    assert order[4] == ("idle", "now")


def test_processes_that_spin_end():
    with busy.spinning(1):
        pass
    with pytest.raises(ZeroDivisionError), busy.spinning(1):
        raise ZeroDivisionError
