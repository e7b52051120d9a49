"""Define the interface of each kind of run (pictures, texts): a `Plan` that loads `Components`."""

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
    """The loaded objects of a run on one process: theta, optimizer, objective and batches.

    Attributes:
        optimizer: `core.optimizer.Optimizer`, or the object that `take_step` uses in its place.
        header: the journal's header.
        callbacks: builds the callbacks on rank 0 and writes dataset.json.
        enough: as of `train.stopping.Limits`.
    """

    scales: ScaleSet
    theta: Parametrization
    optimizer: Any
    objective: Objective[Any]
    batches: Callable[[int], StepBatch[Any]]
    header: dict[str, Any]
    callbacks: Callable[[RunFolder, Tracker], "Callbacks"]
    take_step: TakeStep | None = None
    enough: Callable[[], bool] = lambda: False

    def setup(
        self, probing: Probing, schedule: Schedule, sum_over_ranks: SumOverRanks = no_reduce
    ) -> Setup[Any]:
        """Return these components in the form that the loop takes."""
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
    """Work of a kind of run besides training, such as pictures of every few steps.

    Attributes:
        held_out: micro-batches of the validation loss, always the same.
        every: steps between two calls of `show`; with 0 it is called only at the start and the end.
    """

    held_out: Sequence[Any]
    every: int

    def show(self, step: int) -> None:
        """Make the samples or test scores of this step unless they exist.

        The caller has overridden the scales with those of the step.
        """
        ...

    def results(self) -> dict[str, Any]:
        """Return further figures for `--json`."""
        ...


class Plan(Protocol):
    """Everything that is known before anything heavy is loaded, and a way to load the rest.

    Attributes:
        thing: the noun for one data item in messages, such as "image".
        facts: columns of `data()` that identify the training data; a change of one stops a
            resume without --force.
        has_journal: False if seeds and scalars do not rebuild a step; such a run resumes from its
            last checkpoint.
    """

    @property
    def config(self) -> RunConfig: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def name(self) -> str:
        """The suffix of the default run folder, after the date."""
        ...

    @property
    def thing(self) -> str: ...

    @property
    def facts(self) -> Sequence[str]: ...

    @property
    def has_journal(self) -> bool: ...

    def describe(self) -> str:
        """The text that `--dry-run` prints."""
        ...

    def summary(self) -> str:
        """The lines that a run prints before it begins."""
        ...

    def data(self) -> list[dict[str, Any]]:
        """Return a row for each item of the training or held-out data; `file` names it."""
        ...

    def settings(self) -> dict[str, Any]:
        """Settings that must be equal on all ranks: all but folders, which differ by machine."""
        ...

    def probing(self) -> Probing:
        """Settings of the gradient estimator."""
        ...

    def schedule(self, factor: float) -> Schedule:
        """The rate of each step, times `factor`."""
        ...

    def load(self, ranks: Ranks) -> Components:
        """Encode the data and load the model. The slow part of a start."""
        ...

    def metadata(self, components: Components) -> dict[str, str]:
        """Metadata of the saved scales, which identify their base model."""
        ...
