"""Start or resume a training run of any kind and save its results.

A run that is resumed goes on as if it had never been stopped.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qzo_diffusion.core.errors import (
    ConfigError,
    JournalError,
    RankLost,
    TrainingDiverged,
)
from qzo_diffusion.core.journal import Journal, JournalWriter, read_journal
from qzo_diffusion.core.journal_format import NoteEntry
from qzo_diffusion.runs import provenance
from qzo_diffusion.runs import ranks as all_ranks
from qzo_diffusion.runs.calibration import UNCALIBRATED, Factors, calibrated_
from qzo_diffusion.runs.changes import as_many_as_fit, changes
from qzo_diffusion.runs.plan import Components, Plan
from qzo_diffusion.runs.trainer import Trainer
from qzo_diffusion.system.console import report
from qzo_diffusion.train.checkpoint import (
    bad_steps_at_end,
    cut_metrics,
    examine_checkpoints,
    load_checkpoint_,
    restore_,
    set_aside,
)
from qzo_diffusion.train.distributed import Ranks, join, leave
from qzo_diffusion.train.early_signal import EarlySignal, can_be_checked
from qzo_diffusion.train.interrupt import stop_on_signal
from qzo_diffusion.train.loop import Outcome, train
from qzo_diffusion.train.run_folder import RunFolder
from qzo_diffusion.train.stopping import Limits
from qzo_diffusion.train.tracking import Tracker

JOURNAL, METRICS = "journal.qzo", "metrics.jsonl"


@dataclass(frozen=True)
class Start:
    """The state in which this process starts.

    Attributes:
        step: the first step of this process.
        bad_steps: the number of bad steps in a row before it.
        factors: of the learning rate and the bound.
        damaged: checkpoints that were not used.
        validation: held-out losses by step that the run has measured already.
    """

    step: int = 0
    bad_steps: int = 0
    factors: Factors = UNCALIBRATED
    damaged: Sequence[Path] = ()
    validation: Mapping[int, float] = field(default_factory=dict)


def run(plan: Plan, output_dir: Path) -> dict[str, Any]:
    """Train a new run.

    Returns the figures for `--json`; nothing on ranks other than the first.

    Raises:
        ConfigError: train.patience without anything held out.
        TrainingDiverged, RankLost: after everything was saved.
    """
    check_held_out(plan)
    ranks = join(plan.config.compute.rank_timeout)
    if not ranks.first:
        return follow(plan, ranks, None)
    out = RunFolder.create(output_dir)
    out.write_text("config.yaml", plan.config.to_yaml())
    environment = provenance.environment(plan.config.model, plan.device, plan.dtype)
    out.write_json("environment.json", environment | {"processes": ranks.world})
    return _lead(plan, out, ranks, None)


def resume(plan: Plan, run_folder: Path, *, force: bool = False) -> dict[str, Any]:
    """Go on with a run as if it had never been stopped.

    Raises:
        ConfigError: settings or data changed since, and not `force`; more steps are done than
            train.max_steps; train.calibrate_lr for a run that began without; or train.patience
            without anything held out.
        JournalError: the journal is missing, damaged, or of another model or format.
    """
    check_held_out(plan)
    out = RunFolder(run_folder)
    begun = not plan.has_journal or (run_folder / JOURNAL).exists()
    if not begun and ((run_folder / METRICS).exists() or (run_folder / "checkpoints").exists()):
        raise JournalError(
            f"no {JOURNAL} in {run_folder}, but metrics or checkpoints",
            "the whole folder of a run",
            "restore it",
        )
    # nothing is trained yet where there is no journal, and any settings will do
    journal = JOURNAL if plan.has_journal else None
    changed = changes(plan, run_folder, journal, force) if begun else None
    ranks = join(plan.config.compute.rank_timeout)
    if not ranks.first:
        return follow(plan, ranks, run_folder if begun else None)
    if not begun:  # stopped while it encoded, loaded or calibrated, so nothing was trained
        out.write_text("config.yaml", plan.config.to_yaml())
    return _lead(plan, out, ranks, changed)


def check_held_out(plan: Plan) -> None:
    """Raise ConfigError where train.patience has no held-out loss to wait for."""
    if plan.config.train.patience is None:
        return
    if not any(row["split"] == "validation" for row in plan.data()):
        raise ConfigError(
            f"train.patience={plan.config.train.patience} and no {plan.thing} that is held out",
            "a held-out loss, which patience waits for",
            "hold some out (--validation-dir DIR, or data.validation_examples=N for texts), or "
            "leave train.patience out",
        )


def follow(plan: Plan, ranks: Ranks, resumed: Path | None) -> dict[str, Any]:
    """Run the same steps on a rank other than 0, without writing files.

    A resumed run is read from its folder.
    """
    components = _load(plan, ranks)
    journal = read_journal(resumed / JOURNAL) if resumed is not None and plan.has_journal else None
    start = Start(factors=calibrated_(plan, components, ranks, journal))
    if resumed is not None:
        start = _restore_(plan, components, journal, resumed, start)
    all_ranks.check_ranks(ranks, components.theta)

    def after_step(done: int) -> None:
        if done % all_ranks.CHECK_EVERY == 0:
            all_ranks.check_ranks(ranks, components.theta)
        all_ranks.agree_on_end(ranks, plan.config.train, done)

    with stop_on_signal(lambda text: None) as stop:
        ranks.wants_stop = stop.is_set
        all_ranks.agree_on_end(ranks, plan.config.train, start.step)
        _train(plan, components, ranks, start, lambda text: None, after_step=after_step)
        all_ranks.check_ranks(ranks, components.theta)
    leave()
    return {}


def _train(
    plan: Plan,
    components: Components,
    ranks: Ranks,
    start: Start,
    warn: Callable[[str], None],
    **reports: Any,
) -> Outcome:
    schedule = plan.schedule(start.factors.rate)
    setup = components.setup(plan.probing(), schedule, ranks.sum)
    if not start.step and setup.take_step is None and can_be_checked(setup):
        setup = replace(setup, take_step=EarlySignal(warn))
    return train(
        setup,
        max_steps=plan.config.train.max_steps,
        first_step=start.step,
        bad_steps_before=start.bad_steps,
        stop_requested=ranks.stop_agreed,
        **reports,
    )


def _lead(
    plan: Plan, out: RunFolder, ranks: Ranks, changed: Sequence[str] | None
) -> dict[str, Any]:
    """Run the training on rank 0, which writes all files.

    Args:
        changed: settings and data that differ from the run that goes on; None begins a run.
    """
    minutes = plan.config.train.max_minutes
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    writer = journal = None
    if changed is not None and plan.has_journal:
        writer, journal = JournalWriter.reopen(out.path / JOURNAL)
        if journal.torn_bytes:
            report(f"{JOURNAL}: cut off {journal.torn_bytes} bytes of a step that was not finished")
    with ExitStack() as on_error:
        if writer is not None:
            on_error.callback(writer.close)
        components, start = _load_and_restore(plan, out, ranks, journal, changed is not None)
        if changed is None and plan.has_journal:
            factors = start.factors.header(plan.config.prior.bound is not None)
            writer = JournalWriter.create(out.path / JOURNAL, components.header | factors)
        trainer = _trainer(plan, out, ranks, components, start)
        trainer.journal = writer
        trainer.limits = Limits(plan.config.train.patience, deadline, components.enough)
        on_error.pop_all()
    try:
        if changed is not None:  # the new settings are now known to fit the old files
            out.write_text("config.yaml", plan.config.to_yaml())
            if writer is not None:
                note = {"step": start.step, "changes": as_many_as_fit(changed)}
                writer.append(NoteEntry("resume", note))
        outcome = _steps(plan, trainer, ranks, start)
        trainer.end(outcome)
        results = trainer.results(outcome)
    finally:
        trainer.close()
    leave()
    return results


def _load_and_restore(
    plan: Plan, out: RunFolder, ranks: Ranks, journal: Journal | None, resumed: bool
) -> tuple[Components, Start]:
    """Load the components; restore the state of a run that goes on."""
    components = _load(plan, ranks)
    start = Start(factors=calibrated_(plan, components, ranks, journal))
    if resumed:
        start = _restore_(plan, components, journal, out.path, start)
        # also at step 0: a kill may have left a line of a step that the journal lacks
        start = replace(start, validation=cut_metrics(out.path / METRICS, start.step))
        end = "the journal's end" if plan.has_journal else "the last checkpoint"
        report(f"going on at step {start.step}, {end}")
    return components, start


def _trainer(
    plan: Plan, out: RunFolder, ranks: Ranks, components: Components, start: Start
) -> Trainer:
    # all ranks read the checkpoints before the old ones are dropped
    all_ranks.check_ranks(ranks, components.theta)
    set_aside(start.damaged)
    tracker = Tracker(out.path, plan.config.train.max_steps, start.step)
    return Trainer(
        config=plan.config,
        out=out,
        components=components,
        callbacks=components.callbacks(out, tracker),
        tracker=tracker,
        journal=None,
        ranks=ranks,
        metadata=plan.metadata(components),
        validation=dict(start.validation),
        steps_done=start.step,
    )


def _steps(plan: Plan, trainer: Trainer, ranks: Ranks, start: Start) -> Outcome:
    """Run all steps; where the run diverges or loses a rank, write a checkpoint and raise."""
    with stop_on_signal(report) as stop:
        ranks.wants_stop = lambda: stop.is_set() or trainer.at_limit()
        if start.step:
            trainer.finish_step(start.step)  # a kill may have left work undone
        else:
            trainer.begin()
        all_ranks.agree_on_end(ranks, plan.config.train, start.step)
        try:
            reports = {"on_step": trainer.on_step, "after_step": trainer.after_step}
            warn = trainer.tracker.report
            outcome = _train(plan, trainer.components, ranks, start, warn, **reports)
            all_ranks.check_ranks(ranks, trainer.components.theta)
        except (TrainingDiverged, RankLost):
            trainer.checkpoint(trainer.steps_done)
            raise
    return outcome


def _load(plan: Plan, ranks: Ranks) -> Components:
    components = plan.load(ranks)
    all_ranks.check_same_run(ranks, plan.settings(), plan.data(), plan.facts, components.header)
    return components


def _restore_(
    plan: Plan, components: Components, journal: Journal | None, run: Path, start: Start
) -> Start:
    """Bring theta and the optimizer to where the run was.

    Raises:
        ConfigError: more steps are done than the run is to have.
    """
    if journal is not None:
        provenance.check_journal_fits(journal, components.header)
    checkpoints, damaged = examine_checkpoints(run / "checkpoints")
    for problem in damaged.values():
        report(f"warning: a checkpoint is not used: {problem}")
    newest = checkpoints[-1] if checkpoints else None
    done = bad_steps = 0
    if journal is not None:
        done = restore_(newest, journal, components.theta, components.optimizer)
        bad_steps = bad_steps_at_end(journal)
    elif newest is not None:
        load_checkpoint_(newest, components.theta, components.optimizer)
        done = newest.step
    if done > plan.config.train.max_steps:
        raise _more_are_done(plan, done, run)
    return replace(start, step=done, bad_steps=bad_steps, damaged=list(damaged))


def _more_are_done(plan: Plan, done: int, run: Path) -> ConfigError:
    shorter = f"replay --journal {run / JOURNAL} --to-step N"
    return ConfigError(
        f"train.max_steps={plan.config.train.max_steps}, but {done} steps are done",
        f"train.max_steps={done} or more",
        f"leave the journal's tail out instead: {shorter}"
        if plan.has_journal
        else "give one of the checkpoints to sample or export",
    )
