"""Whole runs that are tuned by choices between two pictures, on the small random model."""

import json
import os
import re
import shutil
import signal
import threading
import time
import urllib.request

import pytest

from benchmarks.rewards.voter import SimulatedVoter, let_vote
from qzo_diffusion.cli import main
from qzo_diffusion.core.journal import read_journal
from qzo_diffusion.rewards import of_pixels
from qzo_diffusion.runs.locate import locate
from qzo_diffusion.runs.style import vote
from tests.conftest import FAST, failing
from tests.forked import ended
from tests.runs.short_run import assert_replayed, assert_same_run

ROUNDS, SIZE = 3, 2
SETTINGS = [
    "--pairs",
    ROUNDS * SIZE,
    f"data.batch_size={SIZE}",
    "reward.steps=1",
    "reward.guidance=0",
    "reward.second=colourfulness",
    "data.resolution=32",
    "train.checkpoint_every=2",
]


@pytest.fixture(scope="session")
def voted_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("votes")
    (folder / "train.txt").write_text("red apple\nbanana\nblue car --n rust\nhouse\n")
    (folder / "held_out.txt").write_text("tree\n")
    return folder


@pytest.fixture(scope="session")
def command(cache, pipeline, voted_folder):
    """The command line of a new run on votes."""

    def build(*arguments, run):
        places = ["--model", pipeline, "--prompts", voted_folder / "train.txt"]
        places += ["--sample-prompts", voted_folder / "held_out.txt", f"data.cache_dir={cache}"]
        fast = [one for one in FAST if not one.startswith("data.batch_size")]
        return [str(one) for one in ["vote", "--run", run, *places, *fast, *SETTINGS, *arguments]]

    return build


def simulated(arguments, score=of_pixels.brightness, before=lambda voter: None, **options):
    """The run of this command with a simulated voter in place of a person."""
    voter = SimulatedVoter(score, **options)
    before(voter)
    return let_vote(arguments, lambda config: voter)


@pytest.fixture(scope="session")
def whole(command, voted_folder):
    """A run of three rounds of two pairs. Tests read it; whoever changes it copies it first."""
    simulated(command(run=voted_folder / "whole"))
    return voted_folder / "whole"


def choices(run):
    lines = (run / "votes.jsonl").read_text().splitlines()
    return {(one["round"], one["pair"]): one["choice"] for one in map(json.loads, lines)}


def test_each_choice_is_a_loss_of_one_pair_in_the_journal(whole):
    journal = read_journal(whole / "journal.qzo")
    assert [entry.step for entry in journal.steps] == list(range(ROUNDS))
    assert all(set(entry.projected_grad) <= {-1.0, 1.0} for entry in journal.steps)
    assert all(len(entry.projected_grad) == SIZE for entry in journal.steps)
    assert journal.header["parametrization"] == "layer"
    assert journal.header["examples"] == SIZE
    assert choices(whole).keys() == {(at, pair) for at in (1, 2, 3) for pair in (1, 2)}
    assert (whole / "final").is_dir()
    rows = json.loads((whole / "rewards.json").read_text())
    assert rows["rewards"] == {}
    assert rows["second"] == "colourfulness"


def test_it_is_replayed_from_its_journal_alone(whole, tmp_path):
    assert_replayed(shutil.copytree(whole, tmp_path / "run"))


def test_choices_move_the_pictures_towards_what_is_looked_for(command, tmp_path):
    """Twelve rounds: the first round's pictures at the end, for voters who want light or dark."""
    found = {}
    for name, sign in (("light", 1), ("dark", -1)):
        means = []

        def score(pictures, prompts, sign=sign, means=means):
            values = of_pixels.brightness(pictures, prompts)
            means.append(sum(values))
            return [sign * value for value in values]

        more = ["--pairs", "24", "train.lr=0.05", "sample.every=0"]
        simulated(command(*more, run=tmp_path / name), score, wrong=0)
        found[name] = sum(means[-8:])
    assert found["light"] > found["dark"]


def _kill():
    os.kill(os.getpid(), signal.SIGKILL)


def _interrupt():
    raise KeyboardInterrupt


def ends_at(call, end):
    """Let the voter's process end after so many choices."""

    def change(voter):
        show, count = voter.show, [0]

        def killing(*arguments):
            show(*arguments)
            count[0] += 1
            if count[0] == call:
                end()

        voter.show = killing

    return change


def killed(arguments, call):
    simulated(arguments, before=ends_at(call, _kill))


@pytest.mark.parametrize("kill", [True, False])
def test_a_vote_that_was_killed_goes_on_bit_for_bit(kill, whole, command, tmp_path):
    """By kill -9 in the last round, and by an interrupt behind the first round's last choice, when
    its step is not in the journal.
    """
    run = tmp_path / "run"
    if kill:
        code, _ = ended(killed, command(run=run), 5)
        assert code == -signal.SIGKILL
    else:
        with pytest.raises(KeyboardInterrupt):
            simulated(command(run=run), before=ends_at(2, _interrupt))
        assert not read_journal(run / "journal.qzo").steps
    assert len(choices(run)) == (5 if kill else 2)
    simulated(["vote", "--run", str(run)])
    assert_same_run(run, whole)
    assert choices(run) == choices(whole)


def test_a_voter_that_is_stopped_leaves_a_result_and_goes_on(whole, command, tmp_path):
    run = tmp_path / "run"

    def stop(voter):
        show = voter.show

        def once(*arguments):
            show(*arguments)
            voter.enough = len(choices(run)) == 3

        voter.show = once

    results = simulated(command(run=run), before=stop)
    assert not results["stopped"]
    assert results["ended_by"] == "person"
    assert (results["pairs_done"], results["pairs_in_hand"], results["pairs"]) == (2, 1, 6)
    assert (run / "final").is_dir()
    simulated(["vote", "--run", str(run)])
    assert read_journal(run / "journal.qzo").steps == read_journal(whole / "journal.qzo").steps


def test_more_pairs_go_on_from_a_finished_run(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    simulated(["vote", "--run", str(run), "--pairs", "8"])
    steps = read_journal(run / "journal.qzo").steps
    assert len(steps) == 4
    assert steps[:3] == read_journal(whole / "journal.qzo").steps
    assert len({entry.lr for entry in steps}) == 1


def test_with_a_prior_and_guidance(command, tmp_path):
    run = tmp_path / "run"
    more = ["prior.weight=1", "prior.batch_size=1", "prior.decay=0.1", "reward.guidance=2"]
    simulated(command(*more, "--pairs", "2", run=run))
    (entry,) = read_journal(run / "journal.qzo").steps
    of_votes, of_prior = entry.projected_grad[:SIZE], entry.projected_grad[SIZE:]
    assert set(of_votes) <= {-1.0, 1.0}
    assert len(of_prior) == 1


def filled_in(form, word="left"):
    text = form.read_text()
    form.write_text(re.sub(r"^(\d+) $", rf"\1 {word}", text, flags=re.MULTILINE))
    return form


def test_without_a_browser_a_round_is_exported_and_imported(command, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "first"
    assert main(command("--export", str(out), run=run)) == 0
    names = {"grid.png", "choices.txt", "pair_001.png", "pair_002.png"}
    assert {path.name for path in out.iterdir()} == names
    assert not read_journal(run / "journal.qzo").steps
    form = filled_in(out / "choices.txt")
    empty = tmp_path / "half.txt"
    empty.write_text(form.read_text().replace("2 left", "2"))
    going_on = ["vote", "--run", str(run)]
    assert main([*going_on, "--import", str(empty)]) == 0
    assert choices(run) == {(1, 1): "left"}
    assert not read_journal(run / "journal.qzo").steps
    assert main([*going_on, "--import", str(form)]) == 0
    assert choices(run) == {(1, 1): "left", (1, 2): "left"}
    (entry,) = read_journal(run / "journal.qzo").steps
    assert set(map(abs, entry.projected_grad)) == {1.0}
    capsys.readouterr()
    assert "round 2" in failing(capsys, main([*going_on, "--import", str(form)]))
    assert "exists" in failing(capsys, main([*going_on, "--export", str(out)]))
    assert len(read_journal(run / "journal.qzo").steps) == 1


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("1 both", "line 3"),
        ("0 left", "line 3"),
        ("1 left right", "line 3"),
        ("x left", "line 3"),
        ("3 left", "pair 3"),
        ("1", "no choice"),
    ],
)
def test_a_form_that_is_filled_in_wrongly_is_told(line, reason, whole, tmp_path, capsys):
    from qzo_diffusion.runs.style.voters import round_key

    run = shutil.copytree(whole, tmp_path / "run")
    form = tmp_path / "form.txt"
    form.write_text(f"# round 4, key {round_key(run)}\n# a\n{line}\n")
    code = main(["vote", "--run", str(run), "--pairs", "8", "--import", str(form)])
    assert reason in failing(capsys, code)
    assert len(read_journal(run / "journal.qzo").steps) == ROUNDS


def test_a_form_of_another_run_or_none_is_refused(whole, tmp_path, capsys):
    form = tmp_path / "form.txt"
    for text, reason in [("# round 4, key 00\n1 left\n", "another run"), ("1 left\n", "begin")]:
        form.write_text(text)
        code = main(["vote", "--run", str(whole), "--import", str(form)])
        assert reason in failing(capsys, code)
    for place in (tmp_path / "none.txt", tmp_path):
        code = main(["vote", "--run", str(whole), "--import", str(place)])
        assert "can't be read" in failing(capsys, code)


def test_a_person_votes_at_the_page_and_stops(command, tmp_path, capsys):
    """By the requests of the page; the address is taken from what the program says."""
    run, codes = tmp_path / "run", []

    def asked(address, body=None):
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(address, data, timeout=60) as answer:
            return json.load(answer)

    def person():
        said, found = "", None
        while not found:
            time.sleep(0.05)
            said += capsys.readouterr().err
            found = re.search(r"http://127\.0\.0\.1:\d+/[\w-]+/", said)
        address = found[0]
        state = asked(f"{address}state")
        while state["done"] < 3:
            if state["ready"]:
                given = {"round": state["round"], "pair": state["pair"], "choice": "right"}
                state = asked(f"{address}choice", given)
            else:
                state = asked(f"{address}state?seen={state['version']}")
        codes.append(asked(f"{address}stop", {})["stopped"])

    thread = threading.Thread(target=person, daemon=True)
    thread.start()
    assert main(command(run=run)) == 0
    thread.join(10)
    assert codes == [True]
    assert choices(run) == dict.fromkeys([(1, 1), (1, 2), (2, 1)], "right")
    assert len(read_journal(run / "journal.qzo").steps) == 1
    assert (run / "final").is_dir()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["qzo.num_directions=2"], "num_directions"),
        (["qzo.estimator=leave_one_out", "qzo.num_directions=2"], "antithetic"),
        (["train.calibrate_lr=true", "qzo.normalize=true"], "calibrate_lr"),
        (["reward.scores=[brightness]"], "with vote"),
        (["reward.scores=[votes,brightness]"], "votes alone"),
        (["reward.second=votes"], "computed"),
        (["--prompts", "{missing}"], "missing"),
        (["--port", "1048576"], "port"),
    ],
)
def test_what_can_not_be_voted_on_is_said_at_once(arguments, reason, command, tmp_path, capsys):
    given = [one.format(missing=tmp_path / "missing") for one in arguments]
    code = main(command(*given, run=tmp_path / "run"))
    assert reason in failing(capsys, code)
    assert not (tmp_path / "run").exists()


def test_prompts_are_asked_for(pipeline, tmp_path, capsys):
    code = main(["vote", "--run", str(tmp_path / "run"), "--model", str(pipeline)])
    assert "without prompts" in failing(capsys, code)


def test_train_leaves_votes_to_vote(whole, command, tmp_path, capsys):
    arguments = ["train", *command(run=tmp_path / "run")[3:]]
    places = [one for one in arguments if one not in ("--pairs", str(ROUNDS * SIZE))]
    code = main([*places, "--reward", "votes", "--output-dir", str(tmp_path / "run")])
    assert "qzo-diffuse vote" in failing(capsys, code)
    assert "qzo-diffuse vote" in failing(capsys, main(["train", "--resume", str(whole)]))


def test_the_result_of_another_run_is_voted_on_in_a_folder_inside(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("- votes", "- brightness"))
    place = vote.find_place(run)
    assert (place.run, place.begun) == (run / "votes", False)
    simulated(["vote", "--run", str(run), *map(str, SETTINGS[:3]), "sample.every=0"])
    settings = locate(run / "votes").settings().read_text()
    assert f"init_from: {run}" in settings
    assert "resolution: 32" in settings
    assert vote.find_place(run).begun
    assert_replayed(run / "votes")


def test_it_is_scored_by_the_second_score_and_has_a_page(whole, tmp_path, pages):
    run = shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "p.txt").write_text("pear\nplum\n")
    assert main(["evaluate", "--run", str(run), "--prompts", str(tmp_path / "p.txt")]) == 0
    found = json.loads((run / "reward_evaluation.json").read_text())
    assert found["reward"] is None
    assert found["second"]["name"] == "colourfulness"
    assert main(["report", "--run", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "Only reported: colourfulness" in page
    shutil.rmtree(run / "final")
    assert main(["report", "--run", str(run)]) == 0
    assert "qzo-diffuse vote --run run" in (run / "report.html").read_text()


def test_the_row_of_the_benchmark_is_written(pipeline, cache, voted_folder, whole, tmp_path):
    """The whole row on the small model, with few pairs."""
    from benchmarks.rewards import __main__ as rows
    from tests.conftest import write_squares

    write_squares(tmp_path / "style", ["red", "blue"])
    fast = [one for one in FAST if not one.startswith("data.batch_size")]
    options = ["--work", tmp_path / "work", "--style-dir", tmp_path / "style"]
    options += ["--model", pipeline, "--output", tmp_path, "--pairs", 2, 4]
    more = ["data.batch_size=2", "reward.steps=1", "reward.scorer=embedded", "data.resolution=32"]
    with pytest.MonkeyPatch.context() as patch:
        given = ["votes", *more, *fast, f"data.cache_dir={cache}", *options]
        patch.setattr("sys.argv", ["rewards", *map(str, given)])
        patch.setattr("benchmarks.rewards.runs.PROMPTS", 4)
        patch.setattr(
            "benchmarks.rewards.voter.shipped_prompts",
            lambda folder, use: str(voted_folder / "train.txt"),
        )
        rows.main()
    found = json.loads((tmp_path / "rewards.json").read_text())["votes"]
    assert found["curve"].keys() == {"2", "4"}
    assert found["pairs"] == 4
    assert len(found["style_delta_ci95"]) == 2
    assert found["style_delta"] == found["curve"]["4"]
