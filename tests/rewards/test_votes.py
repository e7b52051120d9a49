"""Choices of a person: their losses, the file that keeps them, and the round that a page sees."""

import json
import math
import threading

import pytest
import torch
from PIL import Image

from qzo_diffusion.core.errors import OutputError
from qzo_diffusion.core.noise import directions_of_step
from qzo_diffusion.core.parametrize import parametrize
from qzo_diffusion.core.probing import Probing, StepBatch
from qzo_diffusion.core.spsa import probe
from qzo_diffusion.rewards.ballot import Ballot
from qzo_diffusion.rewards.objective import Told
from qzo_diffusion.rewards.votes import Pair, VoteFile, pairs_of_round
from tests.quantized import inputs, scaled_network

PROMPTS = ["a", "b", "c"]


def picture(colour):
    return Image.new("RGB", (4, 4), colour)


def test_the_chosen_picture_has_the_lower_loss_on_whichever_side_it_stands():
    for left, chosen in ((True, "left"), (False, "right")):  # the picture at +ε, both times
        pair = Pair(0, "a", left)
        assert pair.sides("plus", "minus")[chosen == "right"] == "plus"
        assert pair.losses(chosen) == (-1, 1)
        assert pair.losses("left" if chosen == "right" else "right") == (1, -1)
        assert pair.losses("equal") == (0, 0)


def test_choices_find_what_is_wanted_as_fast_as_the_theory_says():
    """A voter who is wrong in 20 % wants numbers to go along w, on a model that answers linearly.

    A choice adds ±z. Its part along w has mean c = √(2/π) (2p - 1), all d numbers have variance 1.
    """
    _, scales = scaled_network(dtype=torch.float64)
    theta, words = parametrize(scales, "separable"), torch.Generator().manual_seed(4)
    wanted = {
        name: torch.randn(like.shape, generator=words, dtype=torch.float64)
        for name, like in theta.templates().items()
    }
    moved = {name: torch.zeros_like(one) for name, one in wanted.items()}
    settings = Probing(
        0, 0.1, per_example=True, estimator="antithetic", within_example=True, normalize=False
    )
    batch, rounds = StepBatch([inputs(1, dtype=torch.float64)] * 10), 60
    for step in range(rounds):
        losses = []
        directions = directions_of_step(0, step, 10, "rademacher")
        for pair, direction in zip(pairs_of_round(["a"] * 10, 0, step), directions, strict=True):
            slope = sum(
                (one * theta.combined(name, [direction], [1.0])).sum()
                for name, one in wanted.items()
            )
            mistaken = torch.rand((), generator=words).item() < 0.2
            better_is_plus = bool(slope > 0) != mistaken
            losses += pair.losses("left" if better_is_plus == pair.plus_is_left else "right")
        found = probe(Told(losses), batch, theta, settings, step)
        for name, one in moved.items():
            one -= theta.combined(name, found.directions, found.projected_grad)
    numbers = sum(one.numel() for one in wanted.values())
    c = math.sqrt(2 / math.pi) * 0.6
    expected = c / math.sqrt(c**2 + numbers / (10 * rounds))
    dot, own, other = (
        sum((a[name] * b[name]).sum().item() for name in wanted)
        for a, b in [(moved, wanted), (moved, moved), (wanted, wanted)]
    )
    assert dot / math.sqrt(own * other) == pytest.approx(expected, abs=0.08)
    assert expected > 0.3


def test_sides_follow_from_seed_and_step_and_are_even():
    pairs = pairs_of_round(PROMPTS * 100, seed=3, step=7)
    assert pairs == pairs_of_round(PROMPTS * 100, seed=3, step=7)
    assert pairs != pairs_of_round(PROMPTS * 100, seed=3, step=8)
    assert [pair.place for pair in pairs] == list(range(300))
    assert 110 < sum(pair.plus_is_left for pair in pairs) < 190


def test_choices_are_kept_by_round_and_can_be_taken_back(tmp_path):
    file = VoteFile(tmp_path / "votes.jsonl")
    assert file.of_round(0) == {}
    for step, place, choice in [(0, 0, "left"), (0, 1, "equal"), (1, 0, "right"), (0, 1, None)]:
        file.add(step, place, choice)
    file.add(0, 2, "right")
    assert file.of_round(0) == {0: "left", 2: "right"}
    assert file.of_round(1) == {0: "right"}


def test_a_torn_line_costs_itself_alone(tmp_path):
    file = VoteFile(tmp_path / "votes.jsonl")
    file.add(0, 0, "left")
    whole = (tmp_path / "votes.jsonl").read_bytes()
    for length in range(1, len(whole)):
        (tmp_path / "votes.jsonl").write_bytes(whole + whole[:length])
        assert file.of_round(0) == {0: "left"}
        file.add(0, 1, "right")
        assert file.of_round(0) == {0: "left", 1: "right"}


@pytest.mark.parametrize("line", ["not JSON", "[1]", "3"])
def test_a_damaged_file_is_told(tmp_path, line):
    (tmp_path / "votes.jsonl").write_text(f"{line}\n")
    with pytest.raises(OutputError):
        VoteFile(tmp_path / "votes.jsonl").of_round(0)


def test_values_of_another_kind_are_no_choices(tmp_path):
    lines = [{"round": 1, "pair": "1", "choice": "left"}, {"round": 1, "pair": 1, "choice": ["x"]}]
    (tmp_path / "votes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert VoteFile(tmp_path / "votes.jsonl").of_round(0) == {}


@pytest.fixture
def saved():
    return []


@pytest.fixture
def ballot(saved):
    """The second of four rounds of three pairs; the first two are drawn."""
    made = Ballot(3, 4)
    made.begin(1, pairs_of_round(PROMPTS, 0, 1), {}, lambda *choice: saved.append(choice))
    for pair in pairs_of_round(PROMPTS, 0, 1)[:2]:
        made.show(pair, picture("red"), picture("blue"))
    return made


def test_a_round_is_described_and_goes_on_with_each_choice(ballot, saved):
    state = ballot.state()
    expected = {"round": 2, "rounds": 4, "pair": 1, "pairs": 3, "done": 3, "left": 9}
    assert expected.items() <= state.items()
    assert state["prompt"] == "a"
    assert (state["ready"], state["undo"]) == (True, False)
    ballot.choose(1, 0, "left")
    ballot.choose(1, 1, "equal")
    state = ballot.state()
    assert (state["pair"], state["ready"], state["done"], state["left"]) == (3, False, 5, 7)
    assert saved == [(0, "left"), (1, "equal")]


def test_a_choice_counts_for_the_pair_that_is_shown_alone(ballot, saved):
    """A key that is pressed twice, another tab, or a pair that nobody has seen."""
    for step, place in [(1, 1), (0, 0), (1, 2), (2, 0)]:
        ballot.choose(step, place, "left")
    ballot.choose(1, 0, "left")
    ballot.choose(1, 0, "right")
    ballot.choose(1, 1, "left")
    ballot.choose(1, 2, "left")  # not drawn
    assert saved == [(0, "left"), (1, "left")]


def test_undo_goes_back_to_the_beginning_of_the_round(ballot, saved):
    ballot.undo()
    ballot.choose(1, 0, "left")
    ballot.choose(1, 1, "right")
    for _ in range(3):
        ballot.undo()
    assert saved == [(0, "left"), (1, "right"), (1, None), (0, None)]
    assert ballot.state()["pair"] == 1
    assert ballot.picture(1, 0, right=True) != ballot.picture(1, 0, right=False)


def test_the_drawing_thread_gets_all_choices(ballot):
    found = []
    thread = threading.Thread(target=lambda: found.append(ballot.wait(lambda: False)))
    thread.start()
    for place in range(2):
        ballot.choose(1, place, "left")
    ballot.show(pairs_of_round(PROMPTS, 0, 1)[2], picture("red"), picture("blue"))
    ballot.choose(1, 2, "right")
    thread.join(10)
    assert found == [{0: "left", 1: "left", 2: "right"}]
    assert not ballot.state()["undo"]  # the round is finished


def test_waiting_ends_when_it_is_given_up_and_nothing_more_is_taken(ballot, saved):
    assert ballot.wait(lambda: True) is None
    ballot.stop()
    assert ballot.stopped
    ballot.choose(1, 0, "left")
    assert saved == []
    assert ballot.state()["stopped"]


def test_a_choice_that_can_not_be_kept_ends_the_run(ballot):
    def full(place, choice):
        raise OutputError("a full disk", "room", "free some")

    ballot.begin(1, pairs_of_round(PROMPTS, 0, 1), {}, full)
    ballot.show(pairs_of_round(PROMPTS, 0, 1)[0], picture("red"), picture("blue"))
    ballot.choose(1, 0, "left")
    assert ballot.state()["done"] == 3
    assert ballot.state()["ended"]
    with pytest.raises(OutputError, match="full disk"):
        ballot.wait(lambda: False)
