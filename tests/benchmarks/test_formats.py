"""The benchmarks of formats and of quantizers."""

import json
import sys

import pytest

from benchmarks import quantizers
from benchmarks.formats import __main__ as formats
from benchmarks.formats import of_package
from benchmarks.record import RESULTS


def test_a_missing_package_is_named_with_its_remedy(monkeypatch, capsys):
    monkeypatch.setattr(of_package, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["formats", "sdnq", "--style-dir", "imgs"])
    with pytest.raises(SystemExit, match="2"):
        formats.main()
    assert "pip install --no-deps sdnq" in capsys.readouterr().err


def test_a_format_is_as_good_as_its_worst_kind():
    good = {"roundtrip_identical": True, "forward_equal": True, "change_kept": 1.0}
    bad = {"roundtrip_identical": True, "forward_equal": False, "change_kept": 0.5}
    found = formats.summary({"one": good, "other": bad}, "diffusers")
    assert found == {**bad, "foreign_reader": "diffusers"}
    without_file = formats.summary({"one": {**good, "roundtrip_identical": None}}, "diffusers")
    assert without_file["roundtrip_identical"] is None


def test_the_table_of_quantizers_is_that_of_its_file():
    figures = json.loads((RESULTS / "quantizers.json").read_text())
    assert quantizers.table(figures) in quantizers.DOCUMENT.read_text()
