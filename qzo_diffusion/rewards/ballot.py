"""The round that a person votes on, shared by the thread that draws and those that serve the page.

The drawing thread begins a round, hands over each pair of pictures as soon as it is drawn, and
waits for the last choice. Meanwhile the page asks for the pair to look at and brings choices.
"""

import io
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from qzo_diffusion.rewards.votes import Choice, Pair

POLL_SECONDS = 0.2  # between two looks at a signal while nothing happens
Save = Callable[[int, Choice | None], None]
"""Keep the choice of a pair by its place; None takes it back."""


class Ballot:
    """The state of a vote.

    Args:
        pairs_of_round: pairs of every round.
        rounds: of the whole run.
    """

    def __init__(self, pairs_of_round: int, rounds: int) -> None:
        self._changed = threading.Condition()
        self._pairs_of_round, self._rounds = pairs_of_round, rounds
        self._version = 0
        self._step = 0
        self._pairs: Sequence[Pair] = ()
        self._choices: dict[int, Choice] = {}
        self._made: list[int] = []  # places that were chosen since the round's pictures are here
        self._pictures: dict[int, tuple[bytes, bytes]] = {}
        self._save: Save = lambda place, choice: None
        self._problem: Exception | None = None
        self._stopped = self._ended = False

    @property
    def stopped(self) -> bool:
        """Whether the person wants to end the run with the rounds that are finished."""
        return self._stopped

    # the thread that draws

    def begin(
        self, step: int, pairs: Sequence[Pair], choices: Mapping[int, Choice], save: Save
    ) -> None:
        """Begin a round, of which some choices may be known."""
        with self._changed:
            self._step, self._pairs, self._save = step, pairs, save
            self._choices, self._pictures, self._made = dict(choices), {}, []
            self._change()

    def show(self, pair: Pair, left: Image.Image, right: Image.Image) -> None:
        """Hand over the pictures of a pair."""
        with self._changed:
            self._pictures[pair.place] = (_png(left), _png(right))
            self._change()

    def wait(self, give_up: Callable[[], bool]) -> dict[int, Choice] | None:
        """Return all choices of the round by place; None where `give_up` comes first.

        Raises:
            OutputError: a choice could not be kept.
        """
        with self._changed:
            while len(self._choices) < len(self._pairs):
                if self._problem is not None:
                    raise self._problem
                if give_up():
                    return None
                self._changed.wait(POLL_SECONDS)
            return dict(self._choices)

    def end(self) -> None:
        """Say that no more choices are taken."""
        with self._changed:
            self._ended = True
            self._change()

    # the page

    def state(self, seen: int | None = None, seconds: float = 0.0) -> dict[str, Any]:
        """Return the state for the page; wait so many seconds for another one than `seen`."""
        with self._changed:
            if seen is not None:
                self._changed.wait_for(lambda: self._version != seen, seconds)
            return self._described()

    def choose(self, step: int, place: int, choice: Choice) -> None:
        """Take the choice of the pair that is shown; one of another pair comes too late and is
        left out.
        """
        with self._changed:
            pair = self._current()
            if self._closed or pair is None or (step, place) != (self._step, pair.place):
                return
            if place in self._pictures and self._kept(place, choice):
                self._choices[place] = choice
                self._made.append(place)
                self._change()

    def undo(self) -> None:
        """Take the last choice of this round back."""
        with self._changed:
            if self._can_undo() and self._kept(self._made[-1], None):
                del self._choices[self._made.pop()]
                self._change()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._change()

    def picture(self, step: int, place: int, right: bool) -> bytes | None:
        """Return a picture of this round as PNG."""
        with self._changed:
            found = self._pictures.get(place) if step == self._step else None
            return found[right] if found else None

    @property
    def _closed(self) -> bool:
        return self._stopped or self._ended or self._problem is not None

    def _kept(self, place: int, choice: Choice | None) -> bool:
        """Keep a choice on the disk before it counts; the drawing thread tells of a failure."""
        try:
            self._save(place, choice)
        except Exception as error:
            self._problem = error
            self._change()
            return False
        return True

    def _can_undo(self) -> bool:
        return bool(self._made) and len(self._choices) < len(self._pairs) and not self._closed

    def _current(self) -> Pair | None:
        return next((pair for pair in self._pairs if pair.place not in self._choices), None)

    def _described(self) -> dict[str, Any]:
        pair = self._current()
        done = self._step * self._pairs_of_round + len(self._choices)
        return {
            "version": self._version,
            "round": self._step + 1,
            "rounds": self._rounds,
            "pair": None if pair is None else pair.place + 1,
            "pairs": self._pairs_of_round,
            "done": done,
            "left": self._rounds * self._pairs_of_round - done,
            "prompt": "" if pair is None else pair.prompt,
            "ready": pair is not None and pair.place in self._pictures,
            "undo": self._can_undo(),
            "stopped": self._stopped,
            "ended": self._ended or self._problem is not None,
        }

    def _change(self) -> None:
        self._version += 1
        self._changed.notify_all()


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, format="PNG")
    return buffer.getvalue()
