"""A journal alone rebuilds any step of a run, or says why it can not."""

import pytest

from tests.conftest import failing
from tests.runs.short_run import assert_replayed, load_equal, replay
from tests.started import start


@pytest.mark.parametrize(
    "setting",
    ["qzo.regions=1", "qzo.per_example=false", "qzo.normalize=running", "qzo.estimator=antithetic"],
)
def test_runs_with_another_estimate_are_replayed(train, tmp_path, setting):
    assert train("--max-steps", 2, setting, "train.schedule=hold") == 0
    assert_replayed(tmp_path / "run")


def test_a_decay_beyond_the_usual_rate_is_replayed(train, tmp_path):
    assert train("--max-steps", 2, "prior.decay=50", "train.lr=0.01") == 0
    assert_replayed(tmp_path / "run")


def test_replay_rebuilds_the_run_and_its_checkpoints(whole, tmp_path):
    code, out = replay(tmp_path, whole)
    assert code == 0
    assert load_equal(whole, out)
    code, middle = replay(tmp_path, whole, "--to-step", 4, name="middle")
    assert code == 0
    assert load_equal(whole / "checkpoints/step_000004", middle)


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "threads"), [("default", "1"), ("avx2", "4")])
def test_replay_of_a_run_gives_its_scales_with_other_vector_instructions_and_threads(
    whole, tmp_path, capability, threads
):
    command = [
        "-m",
        "qzo_diffusion.cli",
        "replay",
        "--journal",
        str(whole / "journal.qzo"),
        "--output-dir",
        str(tmp_path / "again"),
    ]
    process = start(command, ATEN_CPU_CAPABILITY=capability, OMP_NUM_THREADS=threads)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert load_equal(whole, tmp_path / "again")


def test_replay_refuses_steps_and_models_that_do_not_fit(whole, tmp_path, capsys):
    assert "0 to 6" in failing(capsys, replay(tmp_path, whole, "--to-step", 7)[0])
    failing(capsys, replay(tmp_path, tmp_path)[0])


def test_a_journal_of_another_format_is_refused(whole, tmp_path, capsys, monkeypatch):
    capsys.readouterr()
    monkeypatch.setattr("qzo_diffusion.runs.provenance.JOURNAL_FORMAT", 99)
    assert "as in format 3" in failing(capsys, replay(tmp_path, whole)[0])
