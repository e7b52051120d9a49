"""Voters besides the page: one that writes a round's pictures into a folder, and one that has the
choices of a file.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from qzo_diffusion.core.errors import DataError, OutputError
from qzo_diffusion.core.journal import read_journal
from qzo_diffusion.diffusion.sampling import grid, save_picture
from qzo_diffusion.rewards.ballot import Ballot
from qzo_diffusion.rewards.votes import CHOICES, Choice, Pair
from qzo_diffusion.runs.style.voted_step import Round
from qzo_diffusion.system.files import check_empty, write_folder, write_whole
from qzo_diffusion.system.reading import TooMuch, read_bytes

FORM, GRID = "choices.txt", "grid.png"
MOST_BYTES = 2**20  # of a file of choices
_HEAD = "# round "


class AtPage:
    """A person at the page, by its `Ballot`."""

    def __init__(self, ballot: Ballot) -> None:
        self._ballot = ballot

    @property
    def enough(self) -> bool:
        return self._ballot.stopped

    def begin(self, of_round: Round) -> None:
        self._ballot.begin(of_round.step, of_round.pairs, of_round.known, of_round.save)

    def show(self, pair: Pair, left: Image.Image, right: Image.Image) -> None:
        self._ballot.show(pair, left, right)

    def choices(self, give_up: Callable[[], bool]) -> Mapping[int, Choice] | None:
        return self._ballot.wait(give_up)


@dataclass
class Exporter:
    """Write the pairs of the round in hand that have no choice yet: a picture of each, a numbered
    grid of all, and a form for the choices.

    Args:
        run: the run's folder.
        target: a new folder.
    """

    run: Path
    target: Path
    enough: bool = False
    pairs: int = 0
    _round: Round | None = None
    _rows: list[tuple[Pair, Image.Image, Image.Image]] = field(default_factory=list)

    def check(self) -> None:
        """Raises OutputError where there is something at `target` already."""
        check_empty(self.target, "give another folder")

    def begin(self, of_round: Round) -> None:
        self._round = of_round

    def show(self, pair: Pair, left: Image.Image, right: Image.Image) -> None:
        self._rows.append((pair, left, right))

    def choices(self, give_up: Callable[[], bool]) -> None:
        assert self._round is not None
        write_folder(self.target, self._write, marked=False)
        self.pairs, self.enough = len(self._rows), True

    def _write(self, folder: Path) -> None:
        assert self._round is not None
        rows = [
            grid([[left], [right]], [f"{pair.place + 1}  left", f"{pair.place + 1}  right"])
            for pair, left, right in self._rows
        ]
        for (pair, _, _), row in zip(self._rows, rows, strict=True):
            save_picture(row, folder / f"pair_{pair.place + 1:03d}.png")
        save_picture(_stacked(rows), folder / GRID)
        text = form(self.run, self._round.step, [pair for pair, _, _ in self._rows])
        write_whole(folder / FORM, text.encode())


def _stacked(rows: list[Image.Image]) -> Image.Image:
    whole = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        whole.paste(row, (0, top))
        top += row.height
    return whole


def form(run: Path, step: int, pairs: list[Pair]) -> str:
    """Return a form with a line for each pair, which says which round of which run it is of."""
    lines = [
        f"{_HEAD}{step + 1}, key {round_key(run)}",
        f"# Write left, right or equal behind each number; {GRID} shows the pairs.",
    ]
    for pair in pairs:
        lines += [f"# {' '.join(pair.prompt.split())}", f"{pair.place + 1} "]
    return "\n".join(lines) + "\n"


def round_key(run: Path) -> str:
    """Return a hash of all that the pictures of the next round follow from. Raises JournalError."""
    journal = read_journal(run / "journal.qzo")
    text = json.dumps([journal.header, [one.projected_grad for one in journal.steps]], default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@dataclass
class Importer:
    """Choices of a form that was filled in. Where all pairs of the round have one, the step is done
    without a picture; then the run waits for the next round.
    """

    step: int
    given: Mapping[int, Choice]
    enough: bool = False
    missing: int = 0

    @classmethod
    def read(cls, file: Path, run: Path) -> "Importer":
        """Read a form.

        Raises:
            DataError: it is no form, or of another round or run.
            OutputError, JournalError: the run has no whole journal yet.
        """
        check_run_has_begun(run)
        step, key, given = _read(file)
        done = read_journal(run / "journal.qzo").steps_done
        if step != done or key != round_key(run):
            raise DataError(
                f"{file} holds choices of round {step + 1}"
                + (" of another run, or of another beginning of this one" * (step == done)),
                f"choices of round {done + 1} of {run}, which is next",
                f"export it: qzo-diffuse vote --run {run} --export DIR",
            )
        if not given:
            raise DataError(
                f"no choice in {file}", f"{' or '.join(CHOICES)} behind a number", _FILL
            )
        return cls(step, given)

    def begin(self, of_round: Round) -> None:
        """Keep the choices, those of the form before those that were known."""
        if of_round.step == self.step:
            places = {pair.place for pair in of_round.pairs}
            if unknown := sorted(set(self.given) - places):
                raise DataError(
                    f"a choice of pair {unknown[0] + 1}", f"pairs 1 to {len(places)}", _FILL
                )
            for place, choice in self.given.items():
                if of_round.known.get(place) != choice:
                    of_round.save(place, choice)
            self.missing = len(places - set(of_round.known) - set(self.given))
        self.enough = of_round.step != self.step or self.missing > 0

    def show(self, pair: Pair, left: Image.Image, right: Image.Image) -> None:
        """Look at nothing."""

    def choices(self, give_up: Callable[[], bool]) -> None:
        """Have no others than those that were kept."""


_FILL = f"fill in {FORM} of an export, a number and left, right or equal a line"


def _read(file: Path) -> tuple[int, str, dict[int, Choice]]:
    """Return step, key, and choices by place; lines without a choice are left out."""
    try:
        lines = read_bytes(file, MOST_BYTES).decode("utf-8-sig").splitlines()
    except (OSError, TooMuch, UnicodeDecodeError) as error:
        raise DataError(f"{file} can't be read: {error}", "a text file of choices", _FILL) from None
    head = (lines[0] if lines else "").removeprefix(_HEAD).split(", key ")
    if len(head) != 2 or not head[0].isdecimal() or len(head[0]) > 9 or head[0] == "0":
        raise DataError(f"{file} does not begin with its round and key", f"{_HEAD}N, key K", _FILL)
    given: dict[int, Choice] = {}
    for number, line in enumerate(lines, 1):
        words = line.split()
        bare = len(words) < 2 and (not words or words[0].isdecimal())
        if bare or line.startswith("#"):
            continue
        place = int(words[0]) - 1 if words[0].isdecimal() and len(words[0]) < 10 else -1
        choice = next((one for one in CHOICES if one == words[-1].lower()), None)
        if len(words) != 2 or place < 0 or choice is None or place in given:
            raise DataError(
                f"{file}, line {number}: {line.strip()[:80]!r}",
                f"a number, once, and {', '.join(CHOICES)}",
                _FILL,
            )
        given[place] = choice
    return int(head[0]) - 1, head[1].strip(), given


def check_run_has_begun(run: Path) -> None:
    """Raises OutputError for a run of which no round can have been exported."""
    if not (run / "journal.qzo").is_file():
        raise OutputError(
            f"no journal in {run}",
            "a run whose round was exported",
            "export a round first: --export",
        )
