"""Whole runs that are tuned by scores of pictures, on the small random model."""

import json
import shutil

import pytest
import torch

from qzo_diffusion.cli import main
from qzo_diffusion.core.journal import read_journal
from qzo_diffusion.runs.tuned import load_scales
from tests.conftest import FAST, failing, killed_after, metrics
from tests.runs.short_run import assert_replayed, assert_same_run, resume

STEPS = 4
SETTINGS = [
    "--max-steps",
    STEPS,
    "reward.steps=2",
    "qzo.num_directions=3",
    "data.resolution=32",
    "sample.every=2",
    "train.checkpoint_every=2",
    "train.lr=0.2",
]


@pytest.fixture(scope="session")
def command(cache, pipeline, tmp_path_factory):
    """The command line of a run on rewards; prompts and their pictures are small."""
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "train.txt").write_text("red apple\nbanana\nblue car --n rust\nhouse\nfish\n")
    (folder / "held_out.txt").write_text("tree\nboat\n")

    def build(*arguments, output_dir, rewards=("brightness",)):
        places = ["--prompts", folder / "train.txt", "--sample-prompts", folder / "held_out.txt"]
        chosen = [part for name in rewards for part in ("--reward", name)]
        more = [f"data.cache_dir={cache}", "--output-dir", output_dir]
        fast = [one for one in FAST if not one.startswith(("data.batch_size", "sample.every"))]
        given = ["--model", pipeline, *places, *chosen, *more, *fast, "data.batch_size=2"]
        return [str(part) for part in ["train", *given, *SETTINGS, *arguments]]

    return build


@pytest.fixture(scope="session")
def whole(command, tmp_path_factory):
    """A run of four steps. Tests read it; whoever changes it copies it first."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert main(command("reward.second=colourfulness", output_dir=run)) == 0
    return run


def test_a_run_leaves_what_every_run_leaves_and_its_scores(whole):
    assert {path.name for path in whole.iterdir()} >= {
        "config.yaml",
        "journal.qzo",
        "dataset.json",
        "rewards.json",
        "final",
        "checkpoints",
    }
    rows = json.loads((whole / "rewards.json").read_text())
    assert rows["rewards"] == {"brightness": 1.0}
    assert rows["second"] == "colourfulness"
    assert [row["step"] for row in rows["steps"]] == [0, 2, 4]
    assert all(len(row[key]) == 2 for row in rows["steps"] for key in ("reward", "second"))
    data = json.loads((whole / "dataset.json").read_text())
    assert [row["caption"] for row in data][:2] == ["red apple", "banana"]
    assert len(read_journal(whole / "journal.qzo").steps) == STEPS
    steps = metrics(whole)
    assert all(-1 <= line["loss"] <= 0 for line in steps)
    assert len(steps) >= STEPS


def test_it_is_replayed_from_its_journal_alone(whole, tmp_path):
    assert_replayed(shutil.copytree(whole, tmp_path / "run"))


def test_a_killed_run_goes_on_bit_for_bit(whole, command, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        killed_after(patch, 3)
        assert main(command("reward.second=colourfulness", output_dir=run)) == 130
    assert resume(run) == 0
    assert_same_run(run, whole)
    assert (run / "rewards.json").read_text() == (whole / "rewards.json").read_text()


def test_with_guidance_a_prior_and_several_rewards(command, tmp_path):
    run = tmp_path / "run"
    rewards = ("brightness=0.5", "compressibility", "colourfulness=-1")
    more = ["reward.guidance=2", "prior.weight=1", "prior.decay=0.1", "reward.second=none"]
    limited = [*more, "--max-steps", "1", "prior.batch_size=1"]
    assert main(command(*limited, rewards=rewards, output_dir=run)) == 0
    rows = json.loads((run / "rewards.json").read_text())
    assert rows["rewards"] == {"brightness=0.5": 0.5, "compressibility": 1, "colourfulness=-1": -1}
    assert rows["second"] is None
    assert len(read_journal(run / "journal.qzo").steps[0].projected_grad) == 3 * 3


FILE = "def score(pictures, prompts):\n    return {body}\n"


def python(tmp_path, body):
    (tmp_path / "mine.py").write_text(FILE.format(body=body))
    return (f"python:{tmp_path / 'mine.py'}:score",)


def test_pictures_without_a_score_are_left_out_and_counted(command, tmp_path):
    bad = "[float('nan') if text == 'banana' else len(text) for text in prompts]"
    run = tmp_path / "run"
    rewards = python(tmp_path, bad)
    assert (
        main(command("data.batch_size=5", "--max-steps", "1", rewards=rewards, output_dir=run)) == 0
    )
    (line,) = metrics(run)[:1]
    assert line["left_out"] == 3
    assert not line["skipped"]


@pytest.mark.parametrize("body", ["1 / 0", "[1.0]", "__import__('time').sleep(600)"])
def test_a_reward_that_fails_stops_the_run_and_loses_nothing(body, command, tmp_path, capsys):
    """It fails in the second step; the first is kept, and the run goes on once it is mended."""
    run, file = tmp_path / "run", tmp_path / "mine.py"
    file.write_text(
        "calls = []\n"
        "def score(pictures, prompts):\n"
        "    calls.append(1)\n"
        f"    return {body} if len(calls) > 2 else [len(calls)] * len(pictures)\n"
    )
    rewards = (f"python:{file}:score",)
    more = ["reward.second=none", "reward.seconds=5", "sample.every=0"]
    code = main(command(*more, rewards=rewards, output_dir=run))
    error = failing(capsys, code)
    assert "mine.py:score" in error
    assert len(read_journal(run / "journal.qzo").steps) == 1
    file.write_text("def score(pictures, prompts):\n    return [0.5] * len(pictures)\n")
    assert resume(run) == 0
    assert len(read_journal(run / "journal.qzo").steps) == STEPS


@pytest.mark.parametrize(
    ("arguments", "rewards", "reason"),
    [
        (["--prompts", "{empty}"], ("brightness",), "no prompt in"),
        ([], ("clip_score:ViT-L-14-quickgelu/openai",), "not in the local cache"),
        ([], ("preference:pickscore",), "not in the local cache"),
        ([], ("style:{missing}",), "no folder"),
        ([], ("python:{missing}:score",), "no file"),
        ([], ("aesthetic:{missing}",), "no file"),
        ([], ("command:{missing}",), "no program"),
        ([], ("beauty",), "clip_score"),
        ([], ("brightness:3",), "without an argument"),
        ([], ("brightness", "brightness=2"), "each reward once"),
        (["--style-dir", "{missing}"], ("brightness",), "--reward with --style-dir"),
        (["qzo.regions=4"], ("brightness",), "qzo.regions"),
        (["qzo.parametrization=dense"], ("brightness",), "per_example"),
        (["sample.tuned_between=[0.0, 0.5]"], ("brightness",), "tuned_between"),
        (["train.patience=2", "train.validate_every=1"], ("brightness",), "held out"),
    ],
)
def test_what_can_not_be_a_reward_is_said_at_once(
    arguments, rewards, reason, command, tmp_path, capsys
):
    (tmp_path / "empty.txt").write_text("# nothing\n")
    places = {"empty": tmp_path / "empty.txt", "missing": tmp_path / "none"}
    arguments, rewards = (
        [one.format(**places) if "{" in one else one for one in given]
        for given in (arguments, rewards)
    )
    run = tmp_path / "run"
    code = main(command(*arguments, rewards=rewards, output_dir=run))
    assert reason in failing(capsys, code)
    assert not run.exists()


def test_scales_of_a_run_can_be_sampled_and_mixed(whole, pipeline, tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("banana\n")
    out = tmp_path / "pictures"
    places = ["--run", whole, "--prompts", prompts, "--output-dir", out]
    assert main(["sample", *map(str, places), "--steps", "2"]) == 0
    assert (out / "samples" / "000.png").is_file()
    mixed = ["mix", "--run", f"{whole}=0.5", "--output-dir", str(tmp_path / "half")]
    assert main(mixed) == 0
    half, own = load_scales(tmp_path / "half")[0], load_scales(whole)[0]
    assert any(not torch.equal(half[name], own[name]) for name in own)


def test_evaluate_compares_base_and_tuned_at_equal_seeds(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "p.txt").write_text("pear\nplum\nboat\n")
    assert main(["evaluate", "--run", str(run), "--prompts", str(tmp_path / "p.txt")]) == 0
    found = json.loads((run / "reward_evaluation.json").read_text())
    assert found["step"] == STEPS
    assert found["prompts"] == ["pear", "plum", "boat"]
    for score in (found["reward"], found["each"]["brightness"], found["second"]):
        base, tuned = (score["values"][state] for state in ("base", "tuned"))
        assert score["delta"] == pytest.approx(sum(tuned) / 3 - sum(base) / 3)
        assert len(score["delta_ci95"]) == 2
    assert found["second"]["name"] == "colourfulness"
    assert found["reward"]["values"]["base"] != found["reward"]["values"]["tuned"]


def test_the_page_shows_both_scores_and_no_path(whole, tmp_path, pages):
    run = shutil.copytree(whole, tmp_path / "run")
    rows = json.loads((run / "rewards.json").read_text())
    rows["second"] = f"python:{tmp_path}/mine.py:score"
    (run / "rewards.json").write_text(json.dumps(rows))
    assert main(["report", "--run", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "What is tuned: brightness" in page
    assert "Only reported: python:mine.py:score" in page
    assert str(tmp_path) not in page


def test_a_dry_run_counts_decoder_and_scorer_and_makes_nothing(command, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(command("--dry-run", output_dir=run, rewards=("clip_score:embedded",))) == 0
    shown = capsys.readouterr().out
    assert "scorers 0.0" in shown
    assert "rewards   clip_score:embedded; reported only: none" in shown
    assert not run.exists()
