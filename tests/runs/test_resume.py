"""A run that was stopped, killed or damaged goes on as if nothing had happened, or says why it
can't.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qzo_diffusion.cli import main
from qzo_diffusion.core.errors import JournalError
from qzo_diffusion.core.journal import Journal, read_journal
from qzo_diffusion.runs import provenance
from qzo_diffusion.runs import trainer as running
from qzo_diffusion.runs.style import pipeline
from qzo_diffusion.runs.tuned import load_scales
from qzo_diffusion.train import calibrate
from qzo_diffusion.train.checkpoint import list_checkpoints
from tests.conftest import failing, metrics
from tests.ranks import start

SETTINGS = [
    "--max-steps",
    6,
    "train.checkpoint_every=2",
    "sample.every=3",
    "train.optimizer=momentum",
    "qzo.parametrization=dense",
]


def assert_same_run(first, second):
    assert metrics(first) == metrics(second)
    scales, others = load_scales(first)[0], load_scales(second)[0]
    assert scales.keys() == others.keys()
    assert all(torch.equal(scales[name], others[name]) for name in scales)
    pictures = sorted(path.name for path in (first / "samples").iterdir())
    assert pictures == sorted(path.name for path in (second / "samples").iterdir())
    for name in pictures:
        assert (first / "samples" / name).read_bytes() == (
            second / "samples" / name
        ).read_bytes(), name
    assert read_journal(first / "journal.qzo").steps == read_journal(second / "journal.qzo").steps


@pytest.fixture
def whole(train, tmp_path):
    assert train(*SETTINGS, name="whole") == 0
    return tmp_path / "whole"


def stop_after(monkeypatch, step):
    """SIGTERM to this process when the step was recorded."""
    original = running.Trainer.on_step

    def on_step(self, record):
        original(self, record)
        if record.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(running.Trainer, "on_step", on_step)


@pytest.mark.parametrize("step", [0, 3])
def test_a_stopped_run_goes_on_bit_for_bit(train, whole, tmp_path, monkeypatch, step):
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        assert train(*SETTINGS, name="parts") == 130
    assert main(["train", "--resume", str(tmp_path / "parts")]) == 0
    assert_same_run(whole, tmp_path / "parts")


REGIONS = [
    "--model",
    "tiny",  # whose losses have a curvature that can be told from chance
    "qzo.parametrization=separable",
    "qzo.per_example=true",
    "qzo.regions=4",
    "train.optimizer=sgd",
]


def test_regions_go_on_and_are_replayed_bit_for_bit(train, tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "FULL_RATE", 5.0)  # so that these images' rate is lowered
    assert train(*SETTINGS, *REGIONS, name="whole") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert train(*SETTINGS, *REGIONS, name="parts") == 130
    assert main(["train", "--resume", str(tmp_path / "parts")]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    journal = read_journal(tmp_path / "whole/journal.qzo")
    assert {len(step.projected_grad) for step in journal.steps} == {4 * 4 * 8}
    # calibrated once, though the run was resumed
    assert journal.steps[0].lr == 0.1 * journal.header["lr_factor"] < 0.1
    assert_replayed(tmp_path / "whole")


def test_a_rate_that_is_chosen_on_going_on_is_taken_as_it_is(train, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(calibrate, "FULL_RATE", 5.0)
    assert train(*SETTINGS, *REGIONS, "train.schedule=constant", name="run") == 0
    assert "train.lr 0.16 -> " in capsys.readouterr().err
    change = ["--max-steps", "7", "train.lr=0.07", "--force"]
    assert main(["train", "--resume", str(tmp_path / "run"), *change]) == 0
    journal = read_journal(tmp_path / "run/journal.qzo")
    assert [step.lr for step in journal.steps[5:]] == [0.16 * journal.header["lr_factor"], 0.07]


def assert_replayed(run):
    again = run.with_name("again")
    assert main(["replay", "--journal", str(run / "journal.qzo"), "--output-dir", str(again)]) == 0
    scales, replayed = load_scales(run)[0], load_scales(again)[0]
    assert all(torch.equal(replayed[name], scales[name]) for name in scales)


@pytest.mark.parametrize(
    "setting",
    ["qzo.regions=1", "qzo.per_example=false", "qzo.normalize=running", "qzo.estimator=antithetic"],
)
def test_runs_with_another_estimate_are_replayed(train, tmp_path, setting):
    assert train("--max-steps", 2, setting, "train.schedule=hold") == 0
    assert_replayed(tmp_path / "run")


MOMENTS = {
    "before a metrics line": ("qzo_diffusion.train.tracking.Tracker.on_step", 4),
    "between metrics and journal": ("qzo_diffusion.core.journal.JournalWriter.append", 4),
    "before a checkpoint": ("qzo_diffusion.runs.trainer.save_checkpoint", 1),
    "inside a checkpoint": ("qzo_diffusion.train.checkpoint.write_whole", 1),
    "between a folder and its name": ("qzo_diffusion.files.os.replace", 12),
    "before a picture": ("qzo_diffusion.runs.style.samples.save_picture", 2),
}
# the others with -m slow: each costs a start of Python
EVERY_TIME = ("between metrics and journal", "inside a checkpoint")


@pytest.mark.parametrize(
    "moment",
    [pytest.param(m, marks=[] if m in EVERY_TIME else [pytest.mark.slow]) for m in MOMENTS],
)
def test_killed_at_the_worst_moments_it_goes_on_bit_for_bit(
    train_arguments, whole, tmp_path, moment
):
    """Another process dies without any clean-up at the n-th call of a function; nothing may be lost
    but the step in hand.

    Not a fork: a child of a process whose libraries have threads hangs in its first parallel
    product."""
    target, count = MOMENTS[moment]
    script = (
        "import json, sys; from tests.runs.test_resume import _die_at_call; "
        "_die_at_call(sys.argv[1], int(sys.argv[2])); "
    )
    script += "from qzo_diffusion.cli import main; main(json.loads(sys.argv[3]))"
    arguments = json.dumps(train_arguments(*SETTINGS, name="parts"))
    command = [sys.executable, "-c", script, target, str(count), arguments]
    died = subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert died.returncode == -signal.SIGKILL, (
        f"the run ended before the moment came: {died.stderr[-500:]}"
    )
    assert main(["train", "--resume", "latest", "--output-dir", str(tmp_path / "parts")]) == 0
    assert_same_run(whole, tmp_path / "parts")


def _die_at_call(target, count):
    import importlib

    parts = target.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            owner = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        break
    for name in parts[cut:-1]:
        owner = getattr(owner, name)
    original, calls = getattr(owner, parts[-1]), []

    def dying(*arguments, **options):
        calls.append(1)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(owner, parts[-1], dying)


@pytest.fixture
def stopped(train, tmp_path, monkeypatch):
    """A run stopped after four of six steps."""
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert train(*SETTINGS, name="parts") == 130
    return tmp_path / "parts"


def resume(folder, *arguments):
    return main(["train", "--resume", str(folder), *map(str, arguments)])


def test_without_any_checkpoint_the_journal_rebuilds_the_run(whole, stopped):
    shutil.rmtree(stopped / "checkpoints")
    assert resume(stopped) == 0
    assert load_equal(whole, stopped)


def load_equal(first, second):
    one, other = load_scales(first)[0], load_scales(second)[0]
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_damaged_checkpoint_is_told_and_passed_over(whole, stopped, capsys):
    file = stopped / "checkpoints/step_000004/numbers.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    assert resume(stopped) == 0
    assert "passed over a checkpoint" in capsys.readouterr().err
    assert load_equal(whole, stopped)
    checkpoints, problems = list_checkpoints(stopped / "checkpoints")
    assert ([one.step for one in checkpoints], problems) == ([2, 4, 6], [])
    assert (stopped / "checkpoints/damaged_step_000004/numbers.safetensors").read_bytes() == data


def test_a_checkpoint_that_was_damaged_is_written_again(whole, stopped):
    """The run comes by there again when its journal ends before it."""
    (stopped / "checkpoints/step_000004/COMPLETE").unlink()
    journal = read_journal(stopped / "journal.qzo")
    path = stopped / "journal.qzo"
    path.write_bytes(path.read_bytes()[: journal.sizes[2]])  # three steps
    assert resume(stopped) == 0
    assert load_equal(whole, stopped)
    assert [one.step for one in list_checkpoints(stopped / "checkpoints")[0]] == [2, 4, 6]


def test_a_run_without_its_journal_begins_where_nothing_was_trained(whole, tmp_path, capsys):
    """It was stopped while it encoded, loaded or calibrated."""
    early = tmp_path / "early"
    (early / "samples").mkdir(parents=True)
    for name in ("config.yaml", "environment.json"):
        shutil.copy(whole / name, early)
    assert resume(early) == 0
    assert_same_run(whole, early)
    (early / "journal.qzo").unlink()
    capsys.readouterr()
    assert "no journal.qzo" in failing(capsys, resume(early))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("train.optimizer=sgd", "optimizer = 'momentum'"),
        ("qzo.directions=gaussian", "directions"),
        ("train.max_steps=3", "but 4 steps are done"),
    ],
)
def test_settings_that_can_not_go_on_leave_the_run_as_it_was(whole, stopped, capsys, change, told):
    files = [stopped / "config.yaml", stopped / "journal.qzo", stopped / "metrics.jsonl"]
    before = [file.read_bytes() for file in files]
    capsys.readouterr()
    assert told in failing(capsys, resume(stopped, change, "--force"))
    assert [file.read_bytes() for file in files] == before
    assert resume(stopped) == 0
    assert load_equal(whole, stopped)


def test_how_feedback_decays_is_settled_when_a_run_begins():
    header = {"format": provenance.JOURNAL_FORMAT, "optimizer": "feedback", "feedback": [0.95, 40]}
    journal = Journal(header, (), (), (), "", 0, 0)
    provenance.check_journal_fits(journal, dict(header))
    with pytest.raises(JournalError, match="feedback = "):
        provenance.check_journal_fits(journal, header | {"feedback": [0.5, 40]})


def test_a_rate_is_calibrated_where_a_run_begins_or_not_at_all(train, tmp_path, capsys):
    assert train("--max-steps", 0, name="run") == 0
    more = ["--max-steps", 1, "--force"]
    capsys.readouterr()
    assert "was not calibrated where it began" in failing(capsys, resume(tmp_path / "run", *more))
    assert resume(tmp_path / "run", *more, "train.calibrate_lr=false") == 0
    assert [step.lr for step in read_journal(tmp_path / "run/journal.qzo").steps] == [0.1]


def test_a_torn_journal_is_told_and_goes_on(whole, stopped, capsys):
    shutil.rmtree(stopped / "checkpoints")
    path = stopped / "journal.qzo"
    path.write_bytes(path.read_bytes()[:-3])
    assert resume(stopped) == 0
    assert "cut off" in capsys.readouterr().err
    assert_same_run(whole, stopped)


def test_a_damaged_journal_is_refused_and_nothing_is_touched(stopped, capsys):
    path = stopped / "journal.qzo"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    before = {file: file.read_bytes() for file in stopped.rglob("*") if file.is_file()}
    capsys.readouterr()
    assert "damaged" in failing(capsys, resume(stopped))
    assert before == {file: file.read_bytes() for file in stopped.rglob("*") if file.is_file()}


def test_a_journal_shorter_than_its_checkpoint_is_refused(stopped, capsys):
    path = stopped / "journal.qzo"
    path.write_bytes(path.read_bytes()[: read_journal(path).sizes[0]])
    capsys.readouterr()
    assert "ends at step 1" in failing(capsys, resume(stopped))


def test_changed_settings_are_refused_with_the_difference_unless_forced(stopped, capsys):
    capsys.readouterr()
    error = failing(capsys, resume(stopped, "train.lr=0.5"))
    assert "train.lr: 0.003 -> 0.5" in error or "train.lr:" in error
    assert resume(stopped, "train.lr=0.5", "--force") == 0
    notes = [
        entry
        for entry in read_journal(stopped / "journal.qzo").entries
        if getattr(entry, "kind", "") == "resume"
    ]
    assert any("train.lr" in change for change in notes[-1].content["changes"])


def test_changed_images_are_refused_with_the_difference(stopped, images, capsys):
    (images / "5.png").unlink()
    (images / "5.txt").unlink()
    (images / "4.txt").write_text("another caption")
    capsys.readouterr()
    error = failing(capsys, resume(stopped))
    assert "image 5.png was removed" in error
    assert "image 4.png: other caption" in error


def test_another_base_is_refused(stopped, tmp_path, capsys):
    settings = (stopped / "config.yaml").read_text()
    (stopped / "config.yaml").write_text(settings.replace("type: nf4", "type: fp4"))
    capsys.readouterr()
    assert "codes" in failing(capsys, resume(stopped))


@pytest.mark.parametrize("where", ["nowhere", "empty"])
def test_resuming_what_is_not_there(tmp_path, capsys, where):
    folder = tmp_path / where
    if where == "empty":
        folder.mkdir()
    failing(capsys, resume(folder))


def test_latest_is_the_newest_run_below_outputs(train, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train("--max-steps", 1, name="outputs/old") == 0
    assert train("--max-steps", 1, name="outputs/new") == 0
    assert main(["train", "--resume", "latest", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"] == "outputs/new"


def test_a_run_goes_on_in_its_own_folder(stopped, tmp_path, capsys):
    capsys.readouterr()
    assert "leave --output-dir out" in failing(
        capsys, resume(stopped, "--output-dir", tmp_path / "other")
    )
    assert not (tmp_path / "other").exists()
    assert main(["train", "--resume", "latest", "--output-dir", str(stopped)]) == 0


def replay(tmp_path, run, *arguments, name="replayed"):
    out = tmp_path / name
    return main(
        [
            "replay",
            "--journal",
            str(run / "journal.qzo"),
            "--output-dir",
            str(out),
            *map(str, arguments),
        ]
    ), out


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


def test_a_run_begins_with_what_another_one_tuned(train, whole, tmp_path, capsys, monkeypatch):
    on_top = [*SETTINGS, "--seed", 1, "--init-from", tmp_path / "whole"]
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert train(*on_top, name="second") == 130
    assert f"begins    with the scales of {whole} after 6 steps" in capsys.readouterr().err
    second = tmp_path / "second"
    assert resume(second) == 0
    assert not load_equal(whole, second)
    assert replay(tmp_path, second, "--to-step", 0, name="before")[0] == 0
    assert load_equal(whole, tmp_path / "before")
    moved = whole.rename(tmp_path / "moved")
    capsys.readouterr()
    assert str(whole) in failing(capsys, replay(tmp_path, second)[0])
    code, out = replay(tmp_path, second, "--init-from", moved)
    assert code == 0
    assert load_equal(second, out)
    capsys.readouterr()
    assert "initial_scales" in failing(
        capsys, replay(tmp_path, second, "--init-from", second, name="wrong")[0]
    )


def test_what_a_run_can_not_begin_with_is_told_before_anything_is_loaded(
    train, whole, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(pipeline, "load_base", lambda *arguments: pytest.fail("loaded"))
    capsys.readouterr()
    assert "quant.blocksize=64" in failing(
        capsys, train("--init-from", whole, "quant.blocksize=128", name="other")
    )
    assert "no tuned scales" in failing(
        capsys, train("--init-from", tmp_path / "nowhere", name="other")
    )
    assert not (tmp_path / "other").exists()


def test_mixing_a_run_with_weight_one_is_the_run(whole, tmp_path):
    assert main(["mix", "--run", f"{whole}=1", "--output-dir", str(tmp_path / "mix")]) == 0
    assert load_equal(whole, tmp_path / "mix")


def test_mixing_half_and_half_of_a_run_is_the_run_within_rounding(whole, tmp_path):
    assert (
        main(
            [
                "mix",
                "--run",
                f"{whole}=0.5",
                "--run",
                f"{whole}=0.5",
                "--output-dir",
                str(tmp_path / "mix"),
            ]
        )
        == 0
    )
    mixed, tuned = load_scales(tmp_path / "mix")[0], load_scales(whole)[0]
    for name, tensor in tuned.items():
        torch.testing.assert_close(mixed[name], tensor, rtol=1e-6, atol=0)


def test_a_checkpoint_is_mixed_with_its_run_s_settings(train, tmp_path, monkeypatch, capsys):
    assert train(*SETTINGS, "quant.blocksize=128", name="coarse") == 0
    checkpoint = tmp_path / "coarse/checkpoints/step_000004"
    assert main(["mix", "--run", f"{checkpoint}=1", "--output-dir", str(tmp_path / "mix")]) == 0
    assert load_equal(checkpoint, tmp_path / "mix")
    # what is there already is found before anything is loaded
    monkeypatch.setattr(pipeline, "load_base", None)
    capsys.readouterr()
    error = failing(
        capsys, main(["mix", "--run", f"{checkpoint}=1", "--output-dir", str(tmp_path / "mix")])
    )
    assert "--resume" not in error


@pytest.mark.parametrize("part", ["nowhere=1", "nowhere", "=1", "nowhere=much"])
def test_bad_parts_of_a_mix_are_told(tmp_path, capsys, part):
    failing(capsys, main(["mix", "--run", part, "--output-dir", str(tmp_path / "mix")]))


def test_a_journal_of_another_format_is_refused(whole, tmp_path, capsys, monkeypatch):
    capsys.readouterr()
    monkeypatch.setattr("qzo_diffusion.runs.provenance.JOURNAL_FORMAT", 99)
    assert "as in format 3" in failing(capsys, replay(tmp_path, whole)[0])
