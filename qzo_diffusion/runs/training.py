"""A training from its first line to its last, whatever is trained; resumed, it goes on as if it had
never been stopped.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

from qzo_diffusion.config.files import DATA_PLACES, changed_settings, load_config
from qzo_diffusion.config.sections import RunConfig
from qzo_diffusion.console import report
from qzo_diffusion.core.errors import (
    ConfigError,
    JournalError,
    OutputError,
    RankLost,
    TrainingDiverged,
)
from qzo_diffusion.core.journal import Journal, JournalWriter, NoteEntry, read_journal
from qzo_diffusion.runs import build, longer, provenance
from qzo_diffusion.runs.job import (
    CHECK_RANKS_EVERY,
    Components,
    Trainer,
    check_ranks,
    check_same_run,
)
from qzo_diffusion.train.calibrate import calibrate
from qzo_diffusion.train.checkpoint import (
    bad_steps_at_end,
    cut_metrics,
    examine_checkpoints,
    load_checkpoint_,
    restore_,
    set_aside,
)
from qzo_diffusion.train.distributed import Ranks, join, leave
from qzo_diffusion.train.interrupt import stop_on_signal
from qzo_diffusion.train.loop import Outcome, train
from qzo_diffusion.train.run_folder import RunFolder
from qzo_diffusion.train.tracking import Tracker

JOURNAL, METRICS = "journal.qzo", "metrics.jsonl"
RATE_FACTOR = "lr_factor"  # in the journal's header, where it was measured
MOST_NOTED = 2**15  # bytes of a note: a record of the journal has room for twice as many


class Plan(Protocol):
    """Everything that is known before anything heavy is loaded, and how to load the rest.

    thing: what one row of the data is called. facts: its columns that make the run; with others it
    is another one. has_journal: False where seeds and scalars do not rebuild a step; such a run
    goes on from its last checkpoint."""

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

    def load(self, ranks: Ranks) -> Components: ...

    def metadata(self, components: Components) -> dict[str, str]:
        """What must be known to apply the result to a base again."""
        ...


def run(plan: Plan, output_dir: Path) -> dict[str, Any]:
    """Train a new run. Returns the figures for `--json`; nothing on ranks other than the first.

    Raises:
        TrainingDiverged, RankLost: after everything was saved.
    """
    ranks = join(plan.config.compute.rank_timeout)
    if not ranks.first:
        return follow(plan, ranks, None)
    out = RunFolder.create(output_dir)
    out.write_text("config.yaml", plan.config.to_yaml())
    out.write_json(
        "environment.json",
        provenance.environment(plan.config.model, plan.device, plan.dtype)
        | {"processes": ranks.world},
    )
    return _work(plan, out, ranks, resumed=False)


def resume(plan: Plan, run_folder: Path, *, force: bool = False) -> dict[str, Any]:
    """Go on with a run as if it had never been stopped.

    Raises:
        ConfigError: settings or data changed since, and not `force`; the message shows how.
        JournalError: the journal is damaged or of another model.
    """
    out = RunFolder(run_folder)
    before = load_config(run_folder / "config.yaml", type(plan.config))
    changed_data = _changed_data(plan, run_folder)
    # data that was moved and is the same is no change
    changes = changed_settings(before, plan.config, () if changed_data else DATA_PLACES)
    if not force:
        journal = JOURNAL if plan.has_journal else None
        changes = longer.without_steps(
            changes, before, plan.config, lambda: longer.steps_done(run_folder, journal)
        )
    changes += changed_data
    if changes and not force:
        raise ConfigError(
            f"other settings or {plan.thing}s than the run was started with:\n  "
            + "\n  ".join(changes),
            "the same ones; the continued run would not be the run",
            "leave the changes out, or add --force to go on with them",
        )
    begun = not plan.has_journal or (run_folder / JOURNAL).exists()
    if not begun and ((run_folder / METRICS).exists() or (run_folder / "checkpoints").exists()):
        raise JournalError(
            f"no {JOURNAL} in {run_folder}, but metrics or checkpoints",
            "the whole folder of a run",
            "restore it",
        )
    ranks = join(plan.config.compute.rank_timeout)
    if not ranks.first:
        return follow(plan, ranks, run_folder if begun else None)
    if not begun:  # it was stopped while it encoded, loaded or calibrated: nothing was trained
        out.write_text("config.yaml", plan.config.to_yaml())
    return _work(plan, out, ranks, resumed=begun, changes=changes)


def follow(plan: Plan, ranks: Ranks, resumed: Path | None) -> dict[str, Any]:
    """What ranks other than the first do: the same steps, and not one file.

    A resumed run is read from its folder.
    """
    components = _load(plan, ranks)
    first_step = bad_steps = 0
    journal = read_journal(resumed / JOURNAL) if resumed is not None and plan.has_journal else None
    rate = _rate_factor(plan, components, ranks, journal)
    if resumed is not None:
        first_step, bad_steps, _ = _restore_(plan, components, journal, resumed)
    check_ranks(ranks, components.theta)
    with stop_on_signal(lambda text: None) as stop:
        ranks.wants_stop = stop.is_set
        _train(
            plan,
            components,
            ranks,
            first_step,
            bad_steps,
            rate,
            after_step=lambda done: (
                check_ranks(ranks, components.theta) if done % CHECK_RANKS_EVERY == 0 else None
            ),
        )
        check_ranks(ranks, components.theta)
    leave()
    return {}


def _train(
    plan: Plan,
    components: Components,
    ranks: Ranks,
    first_step: int,
    bad_steps: int,
    rate: float | None,
    **reports: Any,
) -> Outcome:
    schedule = build.schedule(plan.config, 1.0 if rate is None else rate)
    setup = components.setup(build.probing(plan.config), schedule, ranks.sum)
    return train(
        setup,
        max_steps=plan.config.train.max_steps,
        first_step=first_step,
        bad_steps_before=bad_steps,
        stop_requested=ranks.stop_agreed,
        **reports,
    )


def _work(
    plan: Plan, out: RunFolder, ranks: Ranks, resumed: bool, changes: Sequence[str] = ()
) -> dict[str, Any]:
    writer = journal = None
    if resumed and plan.has_journal:
        writer, journal = JournalWriter.reopen(out.path / JOURNAL)
        if journal.torn_bytes:
            report(f"{JOURNAL}: cut off {journal.torn_bytes} bytes of a step that was not finished")
    try:
        trainer, first_step, bad_steps, rate = _start(plan, out, ranks, resumed, writer, journal)
    except BaseException:
        if writer is not None:
            writer.close()
        raise
    try:
        if resumed:  # now that the new settings are known to go with what is there
            out.write_text("config.yaml", plan.config.to_yaml())
        if writer is not None:
            writer.append(
                NoteEntry("resume", {"step": first_step, "changes": _as_many_as_fit(changes)})
            )
        with stop_on_signal(report) as stop:
            ranks.wants_stop = stop.is_set
            if first_step:
                trainer.finish_step(first_step)  # whatever a kill left undone
            else:
                trainer.validate(0)
                trainer.show(0)
                trainer.report()
            try:
                reports = {"on_step": trainer.on_step, "after_step": trainer.after_step}
                outcome = _train(
                    plan, trainer.components, ranks, first_step, bad_steps, rate, **reports
                )
                check_ranks(ranks, trainer.components.theta)
            except (TrainingDiverged, RankLost):
                trainer.checkpoint(trainer.steps_done)
                raise
        if outcome.stopped:
            trainer.checkpoint(outcome.steps_done)
        else:
            trainer.validate(outcome.steps_done)
            trainer.show(outcome.steps_done)
            trainer.finish(outcome.steps_done)
        trainer.report()
        results = trainer.results(outcome)
    finally:
        trainer.close()
    leave()
    return results


def _load(plan: Plan, ranks: Ranks) -> Components:
    components = plan.load(ranks)
    check_same_run(ranks, plan.settings(), plan.data(), plan.facts, components.header)
    return components


def _rate_factor(
    plan: Plan, components: Components, ranks: Ranks, journal: Journal | None
) -> float | None:
    """What the rate is multiplied by: measured where a run begins, read from its journal where it
    goes on. None: not calibrated.

    Raises:
        ConfigError: a run that goes on was not calibrated where it began.
    """
    train = plan.config.train
    if not train.calibrate_lr or not train.max_steps:
        return None
    if journal is not None:
        if RATE_FACTOR not in journal.header:
            raise ConfigError(
                "train.calibrate_lr=true for a run whose rate was not calibrated where it began",
                "a rate that the run had from its first step on",
                "add train.calibrate_lr=false --force, or start a new run",
            )
        return float(journal.header[RATE_FACTOR])

    def shown(steps: Iterable[int]) -> Iterable[int]:
        return tqdm(
            steps, desc="calibrate train.lr", unit="batch", leave=False, disable=not ranks.first
        )

    calibration = calibrate(
        components.objective,
        components.batches,
        components.theta,
        build.probing(plan.config),
        ranks.sum,
        shown,
    )
    if ranks.first and calibration.rate_factor < 1:
        report(
            f"train.lr {train.lr:.3g} -> {train.lr * calibration.rate_factor:.3g}: the loss has a "
            f"slope of {calibration.slope:.2g} for a "
            f"curvature of {calibration.curvature:.2g} "
            "(train.calibrate_lr=false leaves the rate alone)"
        )
    return calibration.rate_factor


def _restore_(
    plan: Plan, components: Components, journal: Journal | None, run_folder: Path
) -> tuple[int, int, list[Path]]:
    """Bring the numbers to where the run was. Returns the steps done, how many bad ones in a row
    come last, damaged checkpoints.

    Raises:
        ConfigError: more steps are done than the run is to have.
    """
    if journal is not None:
        provenance.check_journal_fits(journal, components.header)
    checkpoints, damaged = examine_checkpoints(run_folder / "checkpoints")
    for problem in damaged.values():
        report(f"warning: passed over a checkpoint: {problem}")
    newest = checkpoints[-1] if checkpoints else None
    done = bad_steps = 0
    if journal is not None:
        done, bad_steps = (
            restore_(newest, journal, components.theta, components.optimizer),
            bad_steps_at_end(journal),
        )
    elif newest is not None:
        load_checkpoint_(newest, components.theta, components.optimizer)
        done = newest.step
    if done > plan.config.train.max_steps:
        raise ConfigError(
            f"train.max_steps={plan.config.train.max_steps}, but {done} steps are done",
            f"train.max_steps={done} or more",
            f"leave the journal's tail out instead: replay --journal {run_folder / JOURNAL} "
            "--to-step N"
            if plan.has_journal
            else "give one of the checkpoints to sample or export",
        )
    return done, bad_steps, list(damaged)


def _start(
    plan: Plan,
    out: RunFolder,
    ranks: Ranks,
    resumed: bool,
    writer: JournalWriter | None,
    journal: Journal | None,
) -> tuple[Trainer, int, int, float | None]:
    """The parts of the run, brought to where it was, with everything that writes and shows; and the
    factor of its rate.
    """
    config = plan.config
    components = _load(plan, ranks)
    rate = _rate_factor(plan, components, ranks, journal)
    first_step, bad_steps, damaged, validation = 0, 0, list[Path](), dict[int, float]()
    if resumed:
        first_step, bad_steps, damaged = _restore_(plan, components, journal, out.path)
        validation = cut_metrics(out.path / METRICS, first_step)
        report(
            f"going on at step {first_step}, "
            + ("the journal's end" if plan.has_journal else "the last checkpoint")
        )
    elif plan.has_journal:
        writer = JournalWriter.create(
            out.path / JOURNAL, components.header | ({} if rate is None else {RATE_FACTOR: rate})
        )
    # nobody goes on before all have read the checkpoints, for the old ones are dropped
    check_ranks(ranks, components.theta)
    set_aside(damaged)
    tracker = Tracker(out.path, config.train.max_steps, first_step)
    trainer = Trainer(
        config=config,
        out=out,
        components=components,
        callbacks=components.callbacks(out, tracker),
        tracker=tracker,
        journal=writer,
        ranks=ranks,
        metadata=plan.metadata(components),
        validation=validation,
        steps_done=first_step,
    )
    return trainer, first_step, bad_steps, rate


def _as_many_as_fit(changes: Sequence[str]) -> list[str]:
    """Into the journal's note; hundreds of images that come and go are named by their number."""
    kept: list[str] = []
    size = 0
    for change in changes:
        size += len(json.dumps(change))
        if size > MOST_NOTED:
            return [*kept, f"and {len(changes) - len(kept)} more"]
        kept.append(change)
    return kept


def _changed_data(plan: Plan, run_folder: Path) -> list[str]:
    """What is different from the run's dataset.json, row by row."""
    path = run_folder / "dataset.json"
    if not path.exists():  # stopped before it was written: nothing was trained on yet
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
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
