"""Which run, checkpoint or delta a path means, from wherever it is given."""

import os
from pathlib import Path

import pytest

from qzo_diffusion.core.errors import ConfigError, OutputError
from qzo_diffusion.runs.locate import locate, to_resume
from qzo_diffusion.system.files import SCALES


def make_run(folder, settings="model: tiny\n"):
    """A run with two checkpoints, as far as names go."""
    for name in ("final", "checkpoints/step_000002", "checkpoints/step_000010", "samples/mine"):
        (folder / name).mkdir(parents=True)
        (folder / name / SCALES).touch()
    (folder / "config.yaml").write_text(settings)
    return folder


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


CASES = [
    ("", "final", None),
    ("final", "final", None),
    (f"final/{SCALES}", "final", None),
    ("checkpoints/step_000002", "checkpoints/step_000002", 2),
    (f"checkpoints/step_000002/{SCALES}", "checkpoints/step_000002", 2),
    ("checkpoints", "checkpoints/step_000010", 10),
    ("checkpoints/../final", "final", None),
]


@pytest.mark.parametrize("inside", ["", "final", "checkpoints", "checkpoints/step_000002"])
@pytest.mark.parametrize(("path", "scales", "step"), CASES)
def test_a_path_means_the_same_from_every_folder(run, monkeypatch, inside, path, scales, step):
    monkeypatch.chdir(run / inside)
    for given in (run / path, Path(os.path.relpath(run / path))):
        found = locate(given)
        assert (found.run(), found.scales(), found.step) == (run, run / scales, step)
        assert to_resume(str(given), None) == run


def test_a_link_to_a_checkpoint_means_the_checkpoint(run, tmp_path):
    (tmp_path / "best").symlink_to(run / "checkpoints" / "step_000002")
    found = locate(tmp_path / "best")
    assert (found.run(), found.step) == (run, 2)


@pytest.mark.parametrize("path", ["samples/mine", "none", "../none"])
def test_what_belongs_to_no_run_is_told(run, path):
    with pytest.raises(OutputError, match=r"no config\.yaml"):
        locate(run / path).settings()


def test_a_folder_with_settings_of_its_own_is_a_run_also_below_checkpoints(run):
    """A delta that was exported into a run's folder is itself."""
    delta = make_run(run / "checkpoints" / "delta")
    assert locate(delta).run() == delta


def test_a_run_without_scales_is_told(tmp_path):
    (tmp_path / "config.yaml").touch()
    with pytest.raises(OutputError, match="no tuned scales"):
        locate(tmp_path).scales()


@pytest.mark.parametrize(
    ("settings", "is_a", "no"), [("task: sst2", "llm", "style"), ("model: x", "style", "llm")]
)
def test_a_run_of_the_other_kind_is_refused_by_its_settings(tmp_path, settings, is_a, no):
    found = locate(make_run(tmp_path / "run", settings) / "final")
    assert found.need(is_a) is found
    with pytest.raises(ConfigError, match="a run of"):
        found.need(no)
