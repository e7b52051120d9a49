"""A run that goes on: with other settings or data it would be another run."""

import json
from collections.abc import Sequence
from pathlib import Path

from qzo_diffusion.config.files import DATA_PLACES, changed_settings, load_config
from qzo_diffusion.core.errors import (
    ConfigError,
    OutputError,
)
from qzo_diffusion.runs import longer
from qzo_diffusion.runs.plan import Plan
from qzo_diffusion.system.reading import read_json

ENDS = ("train.patience", "train.max_minutes")  # no step depends on them
MOST_NOTED = 2**15  # bytes of a note: a record of the journal has room for twice as many


def changes(plan: Plan, run: Path, journal: str | None, force: bool) -> list[str]:
    """What is different from the run's settings and data, a line each.

    Args:
        journal: the journal's file name, for runs that have one.
        force: go on with whatever is different.

    Raises:
        ConfigError: something is, and not `force`; the message lists it.
    """
    before = load_config(run / "config.yaml", type(plan.config))
    data = changed_data(plan, run)
    # data that was moved and is the same is no change
    found = changed_settings(before, plan.config, ENDS + (() if data else DATA_PLACES))
    if not force:
        found = longer.without_steps(
            found, before, plan.config, lambda: longer.steps_done(run, journal)
        )
    found += data
    if found and not force:
        raise ConfigError(
            f"other settings or {plan.thing}s than the run was started with:\n  "
            + "\n  ".join(found),
            "the same ones; the continued run would not be the run",
            "leave the changes out, or add --force to go on with them",
        )
    return found


def as_many_as_fit(changes: Sequence[str]) -> list[str]:
    """Into the journal's note; hundreds of images that come and go are named by their number."""
    kept: list[str] = []
    size = 0
    for change in changes:
        size += len(json.dumps(change))
        if size > MOST_NOTED:
            return [*kept, f"and {len(changes) - len(kept)} more"]
        kept.append(change)
    return kept


def changed_data(plan: Plan, run_folder: Path) -> list[str]:
    """What is different from the run's dataset.json, row by row."""
    path = run_folder / "dataset.json"
    if not path.exists():  # stopped before it was written: nothing was trained on yet
        return []
    try:
        rows = read_json(path)
        before = {row["file"]: [row[fact] for fact in plan.facts] for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"{path} is damaged: {error}",
            "the file as it was written",
            "restore it, or start a new run",
        ) from None
    now = {str(row["file"]): [row[fact] for fact in plan.facts] for row in plan.data()}
    changes = [f"{plan.thing} {name} was removed" for name in before.keys() - now.keys()]
    changes += [f"{plan.thing} {name} was added" for name in now.keys() - before.keys()]
    for name in before.keys() & now.keys():
        pairs = zip(plan.facts, before[name], now[name], strict=True)
        changes += [f"{plan.thing} {name}: other {fact}" for fact, a, b in pairs if a != b]
    return sorted(changes)
