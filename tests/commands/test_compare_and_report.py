"""`evaluate --compare` and `report`: tables of runs, and the page on one."""

import json
import shutil

import pytest

from qzo_diffusion.cli import main
from tests.commands.short_runs import scored
from tests.conftest import failing

LANGUAGE = {
    "task": "sst2",
    "metric": "accuracy",
    "test_examples": 4,
    "by_step": {"0": 0.5, "2": 0.75},
}


@pytest.mark.parametrize(
    "content", [LANGUAGE, {"scorer": {"name": "a"}, "clip_score": {"mean": 0.5}}, [], {"style": 1}]
)
def test_what_is_no_evaluation_of_a_run_on_images_is_not_compared(run, tmp_path, capsys, content):
    file = tmp_path / "scores.json"
    file.write_text(json.dumps(content))
    assert str(file) in failing(capsys, main(["evaluate", "--compare", str(file)]))
    shutil.copy(file, run / "evaluation.json")
    assert str(run / "evaluation.json") in failing(
        capsys, main(["evaluate", "--compare", str(run)])
    )


@pytest.mark.usefixtures("pages")
def test_the_page_is_there_while_a_run_goes_on(train, tmp_path, monkeypatch):
    pages = []

    def remember(folder, output=None):
        page = write(folder, output)
        pages.append(page.read_text())
        return page

    from qzo_diffusion.runs import report as report_run

    write = report_run.write
    monkeypatch.setattr(report_run, "write", remember)
    assert train("--max-steps", 2, "sample.every=1") == 0
    assert "Step 0 of 2" in pages[0]
    assert "Step 1 of 2" in pages[1]
    assert "Finished at step 2" in pages[-1]
    assert (tmp_path / "run/report.html").read_text() == pages[-1]


@pytest.mark.usefixtures("pages")
def test_a_page_that_cannot_be_written_stops_no_run(train, tmp_path, monkeypatch):
    from qzo_diffusion.runs import report as report_run

    def full(folder, output=None):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report_run, "write", full)
    assert train("--max-steps", 1) == 0
    assert (tmp_path / "run/final/COMPLETE").exists()


def test_report_writes_where_it_is_told_and_needs_a_run(run, tmp_path, capsys):
    assert (
        main(["report", "--run", str(run), "--output", str(tmp_path / "page.html"), "--json"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["bytes"] == (tmp_path / "page.html").stat().st_size
    failing(capsys, main(["report", "--run", str(tmp_path)]))
    (run / "evaluation.json").write_text('{"steps": []}')
    assert "evaluation.json" in failing(capsys, main(["report", "--run", str(run)]))


def test_runs_are_compared_in_one_table(run, prompts, tmp_path, capsys):
    failing(capsys, main(["evaluate", "--compare", str(run)]))
    prompts.write_text("banana\n")
    assert (
        main(["evaluate", "--scorer", "embedded", "--run", str(run), "--prompts", str(prompts)])
        == 0
    )
    assert scored(run)["clip_score"]["n"] == 1
    assert scored(run)["clip_score"]["ci95"] is None
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(run / "config.yaml", other)
    changed = scored(run)
    changed["scorer"]["name"] = "another"
    (other / "evaluation.json").write_text(json.dumps(changed))
    capsys.readouterr()
    assert main(["evaluate", "--compare", str(run), str(other)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "CLIP" not in lines[0]
    assert len(lines) == 4
    assert "different scorers" in lines[-1]
    assert main(["evaluate", "--compare", str(run), str(other), "--json"]) == 0
    assert [row["run"] for row in json.loads(capsys.readouterr().out)["runs"]] == [
        str(run),
        str(other),
    ]
