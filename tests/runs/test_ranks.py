"""Whole runs of several processes on the embedded model: against one process, stopped, killed,
hanging, deviating, resumed.
"""

import json
import os
import signal
import sys

import pytest
import torch

from qzo_diffusion.cli import main
from qzo_diffusion.core.journal import read_journal
from qzo_diffusion.runs.tuned import load_scales
from qzo_diffusion.train.checkpoint import list_checkpoints
from qzo_diffusion.train.distributed import Ranks
from tests.conftest import failing, metrics
from tests.forked import MOST_SECONDS, end_all, started_ranks

STEPS = 4
SETTINGS = ["--max-steps", STEPS, "train.optimizer=momentum", "train.checkpoint_every=2"]
# one shared direction: its scalar is a sum over ranks
SETTINGS += ["qzo.parametrization=row", "qzo.per_example=false"]


def main_with_accident(what, rank, at, command):
    """The command line, and what happens to one rank just before it does a step."""
    from qzo_diffusion.runs import ranks
    from qzo_diffusion.train import distributed, loop

    signals = {"terminated": signal.SIGTERM, "killed": signal.SIGKILL, "stopped": signal.SIGSTOP}
    original = loop.train_step_

    def train_step_(setup, batch, step):
        if os.environ["RANK"] == str(rank) and step == at:
            if what in signals:
                os.kill(os.getpid(), signals[what])
            elif what == "deviates":
                next(iter(setup.parametrization.by_axis.values()))[0] += 1e-6
        return original(setup, batch, step)

    loop.train_step_ = train_step_
    distributed.ROLL_CALL_SECONDS = 1.0
    ranks.CHECK_EVERY = 3
    sys.exit(main(command))


def launch(arguments, what="nothing", rank=1, step=2, world=2, ends=(0, 1)):
    """(exit code, stderr) of the ranks named in `ends`; the others are killed when those have
    ended.
    """
    processes = started_ranks([(main_with_accident, what, rank, step, arguments)] * world)
    try:
        found = [processes[index].wait(MOST_SECONDS) for index in ends]
        assert all("Traceback" not in errors for _, errors in found), found
        return found
    finally:
        end_all(processes)


@pytest.fixture
def alone(train, tmp_path):
    """The same run in one process; the cache of encoded images is warm afterwards."""
    assert train(*SETTINGS, name="alone") == 0
    return tmp_path / "alone"


def rounding_of_the_loss(batch_loss):
    """How far a loss on the small model may move when the same examples come in batches of another
    size, in fp32.

    A matrix product of another shape adds in another order. With independent roundings u = 2^-24 a
    sum of K terms is then off by at most about 3·sqrt(K)·u of its size (three standard deviations;
    Higham & Mary, SIAM J. Sci. Comput. 41(5), 2019), and P products one after the other by sqrt(P)
    times that. The model has 2 blocks with 7 products in a row each and at most 12 around them, of
    at most K = 256 terms: 3 · sqrt(26 · 256) · u = 1.5e-5 of the output. The loss is quadratic in
    the output, so twice of it."""
    return 2 * 3 * (26 * 256) ** 0.5 * 2**-24 * batch_loss


def test_two_ranks_do_the_step_of_one_process_stop_together_and_one_goes_on(
    alone, train_arguments, tmp_path
):
    two = tmp_path / "two"
    (code, errors), (other_code, other_errors) = launch(
        train_arguments(*SETTINGS, name="two"), what="terminated", rank=1, step=2
    )
    assert (code, other_code) == (130, 0), errors + other_errors
    # the signal came in the third step, and only to rank 1
    assert read_journal(two / "journal.qzo").steps_done == 3
    one, first = metrics(alone)[0], metrics(two)[0]
    assert (one["step"], first["step"]) == (0, 0)
    assert one["sigma_mean"] == first["sigma_mean"]
    for side in ("loss_plus", "loss_minus"):
        assert first[side] == pytest.approx(one[side], rel=0, abs=rounding_of_the_loss(one[side]))
    allowed = 2 * rounding_of_the_loss(one["loss"]) / (2 * one["eps"])
    assert first["projected_grad"] == pytest.approx(one["projected_grad"], rel=0, abs=allowed)
    assert main(["train", "--resume", str(two)]) == 0
    assert read_journal(two / "journal.qzo").steps_done == STEPS
    assert load_scales(two)[0].keys() == load_scales(alone)[0].keys()


def test_two_ranks_train_the_same_codes_and_their_journal_has_them(train_arguments, tmp_path):
    """The roundings of an update are drawn from the journal's scalars, so ranks that differ in one
    bit part for good.
    """
    ended = launch(
        train_arguments(
            "--method", "quzo", "--max-steps", 5, "train.calibrate_lr=true", name="codes"
        )
    )
    # at the third step and at the end all have the same codes
    assert [code for code, _ in ended] == [0, 0], ended
    run, again = tmp_path / "codes", tmp_path / "again"
    assert main(["replay", "--journal", str(run / "journal.qzo"), "--output-dir", str(again)]) == 0
    found, replayed = load_scales(run)[0], load_scales(again)[0]
    assert all(torch.equal(codes, replayed[name]) for name, codes in found.items())
    assert {codes.dtype for codes in found.values()} == {torch.int8}
    assert json.loads((run / "environment.json").read_text())["processes"] == 2


@pytest.mark.slow
def test_another_number_of_ranks_goes_on(alone, train_arguments, tmp_path):
    two = tmp_path / "two"
    assert (
        launch(train_arguments(*SETTINGS, name="two"), what="terminated", rank=0, step=1)[0][0]
        == 130
    )
    results = launch(["train", "--resume", str(two)], world=3, ends=(0, 1, 2))
    assert [code for code, _ in results] == [0, 0, 0], results
    assert read_journal(two / "journal.qzo").steps_done == STEPS
    assert json.loads((two / "environment.json").read_text())["processes"] == 2
    ended, stopped = (load_scales(run)[0] for run in (two, two / "checkpoints/step_000002"))
    assert any(not torch.equal(ended[name], stopped[name]) for name in ended)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["killed", "stopped"])
def test_a_rank_that_dies_or_hangs_is_named_and_the_first_saves(
    train_arguments, alone, tmp_path, what
):
    arguments = train_arguments(*SETTINGS, "compute.rank_timeout=10", name="two")
    [(code, errors)] = launch(arguments, what=what, rank=1, step=3, ends=(0,))
    assert code == 2
    for word in (
        "RankLost",
        "got: rank 1 died or did not answer",
        "expected:",
        "remedy:",
        "--resume",
    ):
        assert word in errors
    checkpoints, problems = list_checkpoints(tmp_path / "two/checkpoints")
    assert (checkpoints[-1].step, problems) == (3, [])
    assert main(["train", "--resume", str(tmp_path / "two")]) == 0
    assert read_journal(tmp_path / "two/journal.qzo").steps_done == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("what", ["killed", "stopped"])
def test_when_the_first_rank_is_gone_the_others_name_it_and_the_journal_has_every_step(
    train_arguments, alone, tmp_path, what
):
    arguments = train_arguments(*SETTINGS, "compute.rank_timeout=10", name="two")
    [(code, errors)] = launch(arguments, what=what, rank=0, step=3, ends=(1,))
    assert code == 2
    assert "got: rank 0 died or did not answer" in errors
    assert read_journal(tmp_path / "two/journal.qzo").steps_done == 3
    assert main(["train", "--resume", str(tmp_path / "two")]) == 0


@pytest.mark.slow
def test_a_rank_with_other_numbers_is_found_at_the_next_check(train_arguments, alone, tmp_path):
    ended = launch(train_arguments(*SETTINGS, name="two"), what="deviates", rank=1, step=1)
    assert [code for code, _ in ended] == [2, 2]
    assert all("rank 1 has other trained numbers than rank 0" in errors for _, errors in ended)
    # checked every third step here
    assert read_journal(tmp_path / "two/journal.qzo").steps_done == 3
    assert list_checkpoints(tmp_path / "two/checkpoints")[0][-1].step == 3


@pytest.mark.slow
def test_ranks_started_with_other_settings_are_refused(train_arguments, alone, tmp_path):
    commands = [train_arguments(*SETTINGS, f"train.lr={lr}", name="two") for lr in (1e-3, 1e-4)]
    processes = started_ranks(
        [(main_with_accident, "nothing", 1, 0, command) for command in commands]
    )
    try:
        for process in processes:
            code, errors = process.wait(MOST_SECONDS)
            assert code == 2
            assert "rank 1 has other model, data or settings than rank 0" in errors
    finally:
        end_all(processes)


def test_more_ranks_than_examples_are_refused(train_arguments, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("qzo_diffusion.runs.training.join", lambda timeout: Ranks(0, 8))
    monkeypatch.setattr(Ranks, "wait", lambda self: None)
    assert "data.batch_size=4 on 8 processes" in failing(
        capsys, main(train_arguments(name="eight"))
    )
