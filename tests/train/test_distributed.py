"""Three processes on a quadratic in float64: what they agree on, what they send, and what they say
when one of them is gone.
"""

import json
import signal

import pytest

from qzo_diffusion.core.errors import ConfigError, RankLost
from qzo_diffusion.train.distributed import Ranks, join
from tests.forked import Forked, end_all
from tests.started import free_port
from tests.train import rank_worker
from tests.train.rank_worker import CASES, EPS, EXAMPLES, HANGING, LR, NUMBERS, STEPS, run

WORLD = 3
LIMIT = 600  # seconds: whoever waits for it, and not for the other ranks, fails the tests here


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What each of the three processes found, after two of them went away on purpose."""
    out = tmp_path_factory.mktemp("ranks")
    ports = [free_port() for _ in range(3)]
    processes = [Forked(rank_worker.main, index, out, LIMIT, ports) for index in range(WORLD)]
    try:
        code, errors = processes[0].wait(LIMIT / 2)
        assert code == 0, errors
        assert processes[2].wait(LIMIT / 2)[0] == -signal.SIGKILL
        assert processes[1].returncode is None, "the process that stopped itself is still there"
    finally:
        end_all(processes)
    return [json.loads((out / f"process_{index}.json").read_text()) for index in range(WORLD)]


@pytest.fixture(scope="module")
def alone():
    """The same runs in one process."""
    return {name: run(Ranks(), **case)[0] for name, case in CASES.items()}


def test_shares_are_the_whole_batch_without_a_gap(told):
    assert [process["share"] for process in told] == [[0, 2], [2, 5], [5, EXAMPLES]]


@pytest.mark.parametrize("case", CASES)
def test_ranks_equal_each_other_bit_for_bit(told, case):
    assert told[0][case]["steps"] == STEPS
    for process in told[1:]:
        assert process[case]["numbers"] == told[0][case]["numbers"]
        assert process[case]["records"] == told[0][case]["records"]


@pytest.mark.parametrize("case", ["one direction", "two directions"])
def test_ranks_equal_one_process_up_to_the_order_of_summation(told, alone, case):
    """A loss is a sum of NUMBERS terms and a mean of EXAMPLES of them, so in whatever order, each
    mean is off by at most (NUMBERS + EXAMPLES) roundings of 2^-53 of its value; d by the sum of
    four such errors over 2ε. An SGD step moves a number by lr · d, an Adam step, whose length does
    not depend on d's size, by at most lr · (relative error of d) · 10: its first moment is at least
    a tenth of ĝ. On this quadratic a difference grows by less than 1.1 a step (lr · curvature <
    0.1), and the losses differ by less than four times it, for the slope of log L along any number
    is below 4."""
    first, other = told[0][case], alone[case]
    allowed = 0.0
    for one, two in zip(first["records"], other["records"], strict=True):
        error = 4 * (NUMBERS + EXAMPLES) * 2**-53 * two["loss"] / (2 * EPS)
        derivatives = two["projected_grad"]
        step = (
            LR * error if case == "one direction" else 10 * LR * error / min(map(abs, derivatives))
        )
        assert one["loss"] == pytest.approx(
            two["loss"], rel=(NUMBERS + EXAMPLES) * 2**-53 + 4 * allowed, abs=0
        )
        allowed = 1.1 * allowed + step
    assert allowed < 1e-9  # or the comparison below would say nothing
    for name, theta in other["numbers"].items():
        assert first["numbers"][name] == pytest.approx(theta, rel=0, abs=allowed)


def test_an_examples_direction_is_its_place_in_the_whole_batch(told, alone):
    """Here nothing is summed over examples, and the zeros of other ranks change no loss: equal to
    the last bit.
    """
    assert told[0]["per example"]["records"] == alone["per example"]["records"]
    assert told[0]["per example"]["numbers"] == alone["per example"]["numbers"]


def test_two_ranks_send_32_bytes_a_step_with_one_direction(told):
    pair = told[0]["pair"]
    assert pair["exchanges"] == STEPS
    # a count, two sums and the wish to stop, in float64; as much is received
    assert pair["bytes"] == 32 * STEPS
    assert told[0]["one direction"]["bytes"] == (WORLD - 1) * 32 * STEPS


def test_a_deviating_rank_is_found_and_named_by_all(told):
    for process in told:
        assert "rank 2 has other numbers than rank 0" in process["deviating"]["message"]


def test_when_one_rank_wants_to_stop_all_stop_after_the_same_step(told):
    for process in told:
        assert process["stop"]["stopped"]
        assert process["stop"]["steps"] == 3
        assert process["stop"]["numbers"] == told[0]["stop"]["numbers"]


def test_a_rank_that_dies_is_named_by_all_others_at_once(told):
    for process in told[:2]:
        assert "got: rank 2 died or did not answer" in process["died"]["message"]


def test_a_rank_that_hangs_is_named_when_the_time_is_over(told):
    assert "got: rank 1 died or did not answer" in told[0]["hung"]["message"]
    assert told[0]["hung"]["seconds"] >= HANGING


def test_ranks_that_never_come_are_told(monkeypatch):
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RankLost, match=r"not all of 2 ranks came within 0\.5 s"):
        join(0.5)


def test_an_environment_that_says_half_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="WORLD_SIZE=2"):
        join(1)
