"""A training from its first line to its last, whatever is trained; resumed, it goes on as if it had never been stopped."""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

from qzo_diffusion import build, provenance
from qzo_diffusion.config import RunConfig, changed_settings, load_config
from qzo_diffusion.core.errors import ConfigError, JournalError, OutputError, RankLost, TrainingDiverged
from qzo_diffusion.core.journal import Journal, JournalWriter, NoteEntry, read_journal
from qzo_diffusion.train.calibrate import survey
from qzo_diffusion.train.checkpoint import bad_steps_at_end, cut_metrics, list_checkpoints, load_checkpoint_, restore_
from qzo_diffusion.train.distributed import Ranks, join, leave
from qzo_diffusion.train.interrupt import stop_on_signal
from qzo_diffusion.train.loop import Outcome, train
from qzo_diffusion.train.run_folder import RunFolder
from qzo_diffusion.train.tracking import Tracker
from qzo_diffusion.training_job import CHECK_RANKS_EVERY, Job, Parts, check_ranks, check_same_run

JOURNAL = "journal.qzo"
RATE_FACTOR = "lr_factor"  # in its header


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Plan(Protocol):
    """Everything that is known before anything heavy is loaded, and how to load the rest.

    thing: what one row of the data is called. facts: its columns that make the run; with others it is another one.
    has_journal: False where seeds and scalars do not rebuild a step; such a run goes on from its last checkpoint.
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

    def load(self, ranks: Ranks) -> Parts: ...

    def metadata(self, parts: Parts) -> dict[str, str]:
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
        "environment.json", provenance.environment(plan.config.model, plan.device, plan.dtype) | {"processes": ranks.world}
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
    changes = changed_settings(before, plan.config) + _changed_data(plan, run_folder)
    if changes and not force:
        raise ConfigError(
            f"other settings or {plan.thing}s than the run was started with:\n  " + "\n  ".join(changes),
            "the same ones; the continued run would not be the run",
            "leave the changes out, or add --force to go on with them",
        )
    if plan.has_journal and not (run_folder / JOURNAL).exists():
        raise JournalError(
            f"no {JOURNAL} in {run_folder}", "the folder of a run that was started", "start it again without --resume"
        )
    ranks = join(plan.config.compute.rank_timeout)
    if not ranks.first:
        return follow(plan, ranks, run_folder)
    return _work(plan, out, ranks, resumed=True, changes=changes)


def follow(plan: Plan, ranks: Ranks, resumed: Path | None) -> dict[str, Any]:
    """What ranks other than the first do: the same steps, and not one file. A resumed run is read from its folder."""
    parts = _load(plan, ranks)
    first_step = bad_steps = 0
    journal = read_journal(resumed / JOURNAL) if resumed is not None and plan.has_journal else None
    rate = _rate_factor(plan, parts, ranks, journal)
    if resumed is not None:
        first_step, bad_steps = _restore_(parts, journal, resumed)
    check_ranks(ranks, parts.numbers)
    with stop_on_signal(lambda text: None) as stop:
        ranks.wants_stop = stop.is_set
        _train(
            plan,
            parts,
            ranks,
            first_step,
            bad_steps,
            rate,
            after_step=lambda done: check_ranks(ranks, parts.numbers) if done % CHECK_RANKS_EVERY == 0 else None,
        )
        check_ranks(ranks, parts.numbers)
    leave()
    return {}


def _train(plan: Plan, parts: Parts, ranks: Ranks, first_step: int, bad_steps: int, rate: float, **reports: Any) -> Outcome:
    return train(
        parts.objective,
        parts.batches,
        parts.numbers,
        parts.optimizer,
        build.probing(plan.config),
        build.schedule(plan.config, rate),
        max_steps=plan.config.train.max_steps,
        first_step=first_step,
        bad_steps_before=bad_steps,
        stop_requested=ranks.stop_agreed,
        sum_over_ranks=ranks.sum,
        take_step=parts.take_step,
        **reports,
    )


def _work(plan: Plan, out: RunFolder, ranks: Ranks, resumed: bool, changes: Sequence[str] = ()) -> dict[str, Any]:
    writer = journal = None
    if resumed and plan.has_journal:
        writer, journal = JournalWriter.reopen(out.path / JOURNAL)
        if journal.torn_bytes:
            say(f"{JOURNAL}: cut off {journal.torn_bytes} bytes of a step that was not finished")
        writer.append(NoteEntry("resume", {"step": journal.steps_done, "changes": list(changes)}))
    if resumed:
        out.write_text("config.yaml", plan.config.to_yaml())
    job, first_step, bad_steps, rate = _start(plan, out, ranks, resumed, writer, journal)
    try:
        with stop_on_signal(say) as stop:
            ranks.wants_stop = stop.is_set
            if first_step:
                job.finish_step(first_step)  # whatever a kill left undone
            else:
                job.validate(0)
                job.show(0)
                job.report()
            try:
                reports = {"on_step": job.on_step, "after_step": job.after_step}
                outcome = _train(plan, job.parts, ranks, first_step, bad_steps, rate, **reports)
                check_ranks(ranks, job.parts.numbers)
            except (TrainingDiverged, RankLost):
                job.checkpoint(job.steps_done)
                raise
        if outcome.stopped:
            job.checkpoint(outcome.steps_done)
        else:
            job.validate(outcome.steps_done)
            job.show(outcome.steps_done)
            job.finish(outcome.steps_done)
        job.report()
        results = job.results(outcome)
    finally:
        job.close()
    leave()
    return results


def _load(plan: Plan, ranks: Ranks) -> Parts:
    parts = plan.load(ranks)
    check_same_run(ranks, plan.settings(), plan.data(), plan.facts, parts.header)
    return parts


def _rate_factor(plan: Plan, parts: Parts, ranks: Ranks, journal: Journal | None) -> float:
    """What the rate is multiplied by: measured where a run begins, read from its journal where it goes on."""
    train = plan.config.train
    if not train.calibrate_lr or not train.max_steps:
        return 1.0
    if journal is not None:
        return float(journal.header.get(RATE_FACTOR, 1.0))

    def shown(steps: Iterable[int]) -> Iterable[int]:
        return tqdm(steps, desc="calibrate train.lr", unit="batch", leave=False, disable=not ranks.first)

    terrain = survey(parts.objective, parts.batches, parts.numbers, build.probing(plan.config), ranks.sum, shown)
    if ranks.first and terrain.rate_factor < 1:
        say(
            f"train.lr {train.lr:.3g} -> {train.lr * terrain.rate_factor:.3g}: the loss has a slope of {terrain.slope:.2g} for a "
            f"curvature of {terrain.curvature:.2g} (train.calibrate_lr=false leaves the rate alone)"
        )
    return terrain.rate_factor


def _restore_(parts: Parts, journal: Journal | None, run_folder: Path) -> tuple[int, int]:
    """Bring the numbers to where the run was. Returns the steps done and how many bad ones in a row come last."""
    if journal is not None:
        provenance.check_journal_fits(journal, parts.header)
    checkpoints, problems = list_checkpoints(run_folder / "checkpoints")
    for problem in problems:
        say(f"warning: passed over a checkpoint: {problem}")
    newest = checkpoints[-1] if checkpoints else None
    if journal is not None:
        return restore_(newest, journal, parts.numbers, parts.optimizer), bad_steps_at_end(journal)
    if newest is None:
        return 0, 0
    load_checkpoint_(newest, parts.numbers, parts.optimizer)
    return newest.step, 0


def _start(
    plan: Plan, out: RunFolder, ranks: Ranks, resumed: bool, writer: JournalWriter | None, journal: Journal | None
) -> tuple[Job, int, int, float]:
    """The parts of the run, brought to where it was, with everything that writes and shows; and the factor of its rate."""
    config = plan.config
    parts = _load(plan, ranks)
    rate = _rate_factor(plan, parts, ranks, journal)
    first_step, bad_steps, validation = 0, 0, dict[int, float]()
    if resumed:
        first_step, bad_steps = _restore_(parts, journal, out.path)
        validation = cut_metrics(out.path / "metrics.jsonl", first_step)
        say(f"going on at step {first_step}, " + ("the journal's end" if plan.has_journal else "the last checkpoint"))
    elif plan.has_journal:
        writer = JournalWriter.create(out.path / JOURNAL, parts.header | {RATE_FACTOR: rate})
    check_ranks(ranks, parts.numbers)  # nobody goes on before all have read the checkpoints, for the old ones are dropped
    tracker = Tracker(out.path, config.train.max_steps, first_step)
    job = Job(
        config=config,
        out=out,
        parts=parts,
        extras=parts.extras(out, tracker),
        tracker=tracker,
        journal=writer,
        ranks=ranks,
        metadata=plan.metadata(parts),
        validation=validation,
        steps_done=first_step,
    )
    return job, first_step, bad_steps, rate


def _changed_data(plan: Plan, run_folder: Path) -> list[str]:
    """What is different from the run's dataset.json, row by row."""
    path = run_folder / "dataset.json"
    if not path.exists():  # stopped before it was written: nothing was trained on yet
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        before = {row["file"]: [row[fact] for fact in plan.facts] for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{path} is damaged: {error}", "the file as it was written", "restore it, or start a new run") from None
    now = {str(row["file"]): [row[fact] for fact in plan.facts] for row in plan.data()}
    changes = [f"{plan.thing} {name} was removed" for name in before.keys() - now.keys()]
    changes += [f"{plan.thing} {name} was added" for name in now.keys() - before.keys()]
    for name in before.keys() & now.keys():
        pairs = zip(plan.facts, before[name], now[name], strict=True)
        changes += [f"{plan.thing} {name}: other {fact}" for fact, a, b in pairs if a != b]
    return sorted(changes)
