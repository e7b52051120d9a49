"""One step of a run on votes: draw its pairs under their probes, let a voter choose, update."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from qzo_diffusion.core.optimizer import Update
from qzo_diffusion.core.probes import Objective
from qzo_diffusion.core.probing import StepBatch
from qzo_diffusion.core.spsa import Estimate, probe
from qzo_diffusion.diffusion.flow_matching import Batch
from qzo_diffusion.rewards.objective import Draw, Shown, Told
from qzo_diffusion.rewards.pictures import PictureBatch
from qzo_diffusion.rewards.votes import Choice, Pair, VoteFile, pairs_of_round
from qzo_diffusion.train.distributed import Ranks
from qzo_diffusion.train.loop import Setup, StepGivenUp, StepRecord

VOTES = "votes.jsonl"


@dataclass(frozen=True)
class Round:
    """The pairs of a step, the choices that are known, and a function that keeps further ones."""

    step: int
    pairs: Sequence[Pair]
    known: Mapping[int, Choice]
    save: Callable[[int, Choice | None], None]


class Voter(Protocol):
    """Whoever chooses: a person at the page, a file, or a program."""

    @property
    def enough(self) -> bool:
        """Whether the run is to end with the rounds that are finished."""
        ...

    def begin(self, of_round: Round) -> None: ...

    def show(self, pair: Pair, left: Image.Image, right: Image.Image) -> None:
        """Take the pictures of the next pair without a choice."""
        ...

    def choices(self, give_up: Callable[[], bool]) -> Mapping[int, Choice] | None:
        """Return all choices of the round by place; None where they do not come, or `give_up` says
        so first.
        """
        ...


@dataclass(frozen=True)
class VoteObjective:
    """The objective of a run on votes. Called as it is, it only draws.

    Args:
        of_prior: losses of the prior's examples.
    """

    draw: Draw
    of_prior: Callable[[Batch], Tensor]

    def __call__(self, batch: PictureBatch | Batch) -> Tensor:
        return self.shown(lambda pictures, texts: None)(batch)

    def shown(self, show: Callable[..., None], **options: Any) -> Objective[PictureBatch | Batch]:
        """Return an objective that draws pictures and shows them (`rewards.objective.Shown`)."""
        return _either(
            Shown(self.draw, show, **options),
            lambda batch: torch.zeros(len(batch), dtype=torch.float64),
        )

    def told(self, losses: Sequence[float]) -> Objective[PictureBatch | Batch]:
        """Return an objective of these losses of pictures, and of the prior's own."""
        return _either(Told(losses), self.of_prior)


def _either(
    of_pictures: Callable[[PictureBatch], Tensor], of_prior: Callable[[Batch], Tensor]
) -> Objective[PictureBatch | Batch]:
    def losses(batch: PictureBatch | Batch) -> Tensor:
        return of_prior(batch) if isinstance(batch, Batch) else of_pictures(batch)

    return losses


class VotedStep:
    """`Setup.take_step` of a run on votes, whose objective is a `VoteObjective`.

    Args:
        run: the run's folder, for votes.jsonl.
        ranks: this process, which is alone.
    """

    def __init__(self, voter: Voter, run: Path, ranks: Ranks) -> None:
        self._voter, self._file, self._ranks = voter, VoteFile(run / VOTES), ranks

    def __call__(self, setup: Setup[Any], batch: StepBatch[Any], step: int) -> StepRecord:
        """Raises StepGivenUp where the choices do not come; those that came are kept."""
        started = time.perf_counter()
        pairs = pairs_of_round(_prompts(batch), setup.probing.seed, step)
        known: Mapping[int, Choice] = self._file.of_round(step)
        if len(known) < len(pairs):
            known = self._asked(setup, batch, Round(step, pairs, known, self._saved(step)))
        losses = [loss for pair in pairs for loss in pair.losses(known[pair.place])]
        found = _probed(setup, _voted(setup).told(losses), batch, step)
        lr = setup.schedule(step)
        setup.optimizer.step_(
            setup.parametrization, Update(found.directions, found.projected_grad, lr)
        )
        seconds = time.perf_counter() - started
        return StepRecord(step, found, lr, setup.probing.eps, batch.sigma_mean, seconds)

    def _saved(self, step: int) -> Callable[[int, Choice | None], None]:
        return lambda place, choice: self._file.add(step, place, choice)

    def _asked(
        self, setup: Setup[Any], batch: StepBatch[Any], of_round: Round
    ) -> Mapping[int, Choice]:
        """Draw the pairs without a choice and return all choices, the known ones among them."""
        self._voter.begin(of_round)
        self._check_go_on()
        kept = self._file.of_round(of_round.step)
        if len(kept) == len(of_round.pairs):  # a voter may have had all of them at hand
            return kept
        gallery = _Gallery(of_round, self._voter, self._check_go_on)
        shown = _voted(setup).shown(gallery.show, skip=gallery.skip)
        _probed(setup, shown, batch, of_round.step)
        choices = self._voter.choices(self._ranks.wants_stop)
        if choices is None:
            self._ranks.wants_stop()  # lets the run see whether the voter has enough
            raise StepGivenUp
        return choices

    def _check_go_on(self) -> None:
        """Raises StepGivenUp where the run is to end."""
        if self._ranks.wants_stop():
            raise StepGivenUp


class _Gallery:
    """Put the pictures of a step's probes together in pairs, as they are drawn."""

    def __init__(self, of_round: Round, voter: Voter, check: Callable[[], None]) -> None:
        self._round, self._voter, self._check = of_round, voter, check
        self._drawn: list[Image.Image] = []
        self._count = 0

    def skip(self, count: int) -> bool:
        """Whether the pair of the next pictures has a choice already."""
        self._check()
        wanted = self._count // 2 not in self._round.known
        self._count += 0 if wanted else count
        return not wanted

    def show(self, pictures: Sequence[Image.Image], texts: tuple[str, ...]) -> None:
        for picture in pictures:
            self._drawn.append(picture)
            self._count += 1
            if len(self._drawn) == 2:
                pair = self._round.pairs[self._count // 2 - 1]
                self._voter.show(pair, *pair.sides(*self._drawn))
                self._drawn = []


def _voted(setup: Setup[Any]) -> VoteObjective:
    assert isinstance(setup.objective, VoteObjective)
    return setup.objective


def _probed(
    setup: Setup[Any], objective: Objective[Any], batch: StepBatch[Any], step: int
) -> Estimate:
    return probe(objective, batch, setup.parametrization, setup.probing, step, setup.sum_over_ranks)


def _prompts(batch: StepBatch[Any]) -> list[str]:
    """Return the prompt of each pair; the prior's examples have none."""
    return [
        text for one in batch.micro_batches if isinstance(one, PictureBatch) for text in one.texts
    ]
