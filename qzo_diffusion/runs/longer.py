"""Allow a resumed run to have another number of steps, if its rate so far equals the rate of a run
of so many steps.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from qzo_diffusion.config.style import RunConfig
from qzo_diffusion.core.errors import ConfigError
from qzo_diffusion.core.journal import read_journal
from qzo_diffusion.core.optimizer import Schedule
from qzo_diffusion.runs import build
from qzo_diffusion.train.checkpoint import list_checkpoints

STEPS = "train.max_steps"


def steps_done(run: Path, journal: str | None) -> int:
    """Return the steps done of a stopped run, by its journal, or by its newest checkpoint without
    one.
    """
    if journal is not None:
        return read_journal(run / journal).steps_done if (run / journal).exists() else 0
    checkpoints, _ = list_checkpoints(run / "checkpoints", check=False)
    return checkpoints[-1].step if checkpoints else 0


def without_steps(
    changes: Sequence[str], before: RunConfig, after: RunConfig, done: Callable[[], int]
) -> list[str]:
    """Drop a change of `train.max_steps` from `changes` if it makes no difference.

    Args:
        done: returns the number of steps done; called only if it matters.

    Raises:
        ConfigError: the rate so far depended on the run's own number of steps.
    """
    if before.train.max_steps == after.train.max_steps:
        return list(changes)
    count, wanted = done(), after.train.max_steps
    other = before.model_copy(deep=True)
    other.train.max_steps = wanted
    same = agree_until(build.schedule(before), build.schedule(other), count)
    if same < count:
        raise ConfigError(
            f"{STEPS}: {before.train.max_steps} -> {wanted} after {count} steps with "
            f"train.schedule={before.train.schedule}",
            f"the rate of a run of {wanted} steps, but from step {same} on this run had the rate "
            f"of one that ends at step {before.train.max_steps}",
            f"leave {STEPS} as it was, begin a new run (style runs: from this one with "
            "--init-from), or add --force to go on with rates that no whole run has",
        )
    return [change for change in changes if not change.startswith(f"{STEPS}: ")]


def agree_until(first: Schedule, second: Schedule, steps: int) -> int:
    """The first step below `steps` at which two schedules differ, or `steps` where none does."""
    return next((step for step in range(steps) if first(step) != second(step)), steps)
