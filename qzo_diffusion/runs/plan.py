"""What a kind of run gives to training: a plan first, then the components that it loads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from qzo_diffusion.config.sections import RunConfig
from qzo_diffusion.core.optimizer import Schedule
from qzo_diffusion.core.parametrization import Parametrization
from qzo_diffusion.core.probes import Objective
from qzo_diffusion.core.probing import Probing, StepBatch
from qzo_diffusion.core.scales import ScaleSet
from qzo_diffusion.core.spsa import SumOverRanks, no_reduce
from qzo_diffusion.train.distributed import Ranks
from qzo_diffusion.train.loop import Setup, TakeStep
from qzo_diffusion.train.run_folder import RunFolder
from qzo_diffusion.train.tracking import Tracker


@dataclass
class Components:
    """What every process of a run has: theta, what it is trained on, and how.

    Attributes:
        optimizer: `core.optimizer.Optimizer`, or what `take_step` uses in its place.
        header: of the journal.
        callbacks: made by the first process alone; writes dataset.json, too.
    """

    scales: ScaleSet
    theta: Parametrization
    optimizer: Any
    objective: Objective[Any]
    batches: Callable[[int], StepBatch[Any]]
    header: dict[str, Any]
    callbacks: Callable[[RunFolder, Tracker], "Callbacks"]
    take_step: TakeStep | None = None

    def setup(
        self, probing: Probing, schedule: Schedule, sum_over_ranks: SumOverRanks = no_reduce
    ) -> Setup[Any]:
        """These components as the loop takes them."""
        return Setup(
            self.objective,
            self.batches,
            self.theta,
            self.optimizer,
            probing,
            schedule,
            sum_over_ranks,
            self.take_step,
        )


class Callbacks(Protocol):
    """What a kind of run does besides training, such as pictures of every few steps.

    Attributes:
        held_out: micro-batches of the validation loss, always the same.
        every: steps between two calls of `show`; 0 is at the start and the end.
    """

    held_out: Sequence[Any]
    every: int

    def show(self, step: int) -> None:
        """What is due at this step and not there yet.

        The numbers of the step are in the scales that a forward sees.
        """
        ...

    def results(self) -> dict[str, Any]:
        """Further figures for `--json`."""
        ...


class Plan(Protocol):
    """Everything that is known before anything heavy is loaded, and how to load the rest.

    Attributes:
        thing: the name of one row of the data, such as "image".
        facts: its columns that make the run; with others it is another one.
        has_journal: False where seeds and scalars do not rebuild a step; such a run goes on from
            its last checkpoint.
    """

    @property
    def config(self) -> RunConfig: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def name(self) -> str:
        """Of a run that is given no folder."""
        ...

    @property
    def thing(self) -> str: ...

    @property
    def facts(self) -> Sequence[str]: ...

    @property
    def has_journal(self) -> bool: ...

    def describe(self) -> str:
        """What `--dry-run` prints."""
        ...

    def summary(self) -> str: ...

    def data(self) -> list[dict[str, Any]]:
        """A row for each thing that is trained on or held out; `file` names it."""
        ...

    def settings(self) -> dict[str, Any]:
        """All that must be the same on every rank."""
        ...

    def probing(self) -> Probing:
        """How a step probes."""
        ...

    def schedule(self, factor: float) -> Schedule:
        """The rate of each step, times `factor`."""
        ...

    def load(self, ranks: Ranks) -> Components: ...

    def metadata(self, components: Components) -> dict[str, str]:
        """What must be known to apply the result to a base again."""
        ...
