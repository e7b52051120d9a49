"""Find out whether a resumed run is still the same run: other settings or data would make another
one.
"""

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
# how much is computed at once, on which only the last bits of a step depend
MEMORY = ("train.micro_batch_size", "sample.batch_size", "reward.decode_at_once")
MOST_NOTED = 2**15  # bytes of a note; a record of the journal has room for twice as many


def changes(plan: Plan, run: Path, journal: str | None, force: bool) -> list[str]:
    """List the differences from the run's settings and data, one line each. A run that had too
    little memory may go on with settings of `MEMORY`.

    Args:
        journal: the journal's file name, for runs that have one.
        force: accept any difference.

    Raises:
        ConfigError: anything else differs, and not `force`; the message lists it.
    """
    before = load_config(run / "config.yaml", type(plan.config))
    data = changed_data(plan, run)
    # moved data with the same content is no change
    found = changed_settings(before, plan.config, ENDS + (() if data else DATA_PLACES))
    if not force:
        found = longer.without_steps(
            found, before, plan.config, lambda: longer.steps_done(run, journal)
        )
    found += data
    refused = [change for change in found if change.partition(":")[0] not in MEMORY]
    if refused and not force:
        raise ConfigError(
            f"other settings or {plan.thing}s than the run was started with:\n  "
            + "\n  ".join(refused),
            "the same ones; the continued run would not be the run",
            "leave the changes out, or add --force to go on with them",
        )
    return found


def as_many_as_fit(changes: Sequence[str]) -> list[str]:
    """Shorten changes for the journal's note: many images that come or go become a number."""
    kept: list[str] = []
    size = 0
    for change in changes:
        size += len(json.dumps(change))
        if size > MOST_NOTED:
            return [*kept, f"and {len(changes) - len(kept)} more"]
        kept.append(change)
    return kept


def changed_data(plan: Plan, run_folder: Path) -> list[str]:
    """List the differences from the run's dataset.json, row by row."""
    path = run_folder / "dataset.json"
    if not path.exists():  # stopped before it was written, so nothing was trained
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
