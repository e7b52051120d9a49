"""What `qzo-diffuse train` does from the first line to the last, for a new run and for one that goes on."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qzo_diffusion import build, resources, style_data
from qzo_diffusion.config import Config, changed_settings, load_config
from qzo_diffusion.core.errors import ConfigError, DataError, JournalError, RankLost, TrainingDiverged
from qzo_diffusion.core.journal import Journal, JournalWriter, NoteEntry, read_journal
from qzo_diffusion.diffusion import sd3
from qzo_diffusion.diffusion.prompts import read_prompts
from qzo_diffusion.diffusion.style_folder import StyleFolder, dataset_table, read_style_folder, summary
from qzo_diffusion.style_job import CHECK_RANKS_EVERY, DATA_FACTS, Parts, StyleJob, check_ranks, check_same_run, journal_header
from qzo_diffusion.train.checkpoint import bad_steps_at_end, cut_metrics, list_checkpoints, restore_
from qzo_diffusion.train.distributed import Ranks, join, leave
from qzo_diffusion.train.interrupt import stop_on_signal
from qzo_diffusion.train.loop import train
from qzo_diffusion.train.run_folder import RunFolder
from qzo_diffusion.train.tracking import Tracker

JOURNAL = "journal.qzo"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Plan:
    """Everything that is known before anything heavy is loaded; what `--dry-run` prints."""

    config: Config
    model_folder: Path
    device: torch.device
    dtype: torch.dtype
    style: StyleFolder
    sample_prompts: list[str]

    def describe(self) -> str:
        return f"{self.config.to_yaml()}\n{self.summary()}"

    def summary(self) -> str:
        lines = [
            summary(self.style),
            f"prompts   {len(self.sample_prompts)} to sample",
            f"compute   {self.device}, {str(self.dtype).removeprefix('torch.')}",
        ]
        return "\n".join(lines)


def make_plan(config: Config) -> Plan:
    """Resolve the model, the device and the data, and check all of them."""
    if config.data.style_dir is None:
        raise ConfigError("no style folder", "a folder of images", "pass --style-dir DIR or set data.style_dir")
    folder, why = build.choose_model(config.model)
    say(why)
    sd3.check_model_folder(folder)
    device = build.choose_device(config.compute.device)
    resolution = config.data.resolution or sd3.native_resolution(folder)
    images = resources.find_file(config.data.style_dir, "demo_images")
    held_out = resources.find_file(config.data.validation_dir, "demo_images") if config.data.validation_dir else None
    style = read_style_folder(
        images,
        resolution=resolution,
        caption=config.data.caption,
        trigger=config.data.trigger,
        repeats=config.data.repeats,
        strict=config.data.strict,
        validation_dir=held_out,
        seed=config.train.seed,
    )
    if not style.train:
        raise DataError("no image to train on", "at least one", "give more images or a separate --validation-dir")
    default = "tiny_grid.txt" if build.is_tiny(folder) else "grid.txt"
    prompts = read_prompts(resources.find_file(config.sample.prompts or default, "prompts"), config.data.trigger)
    settled = config.model_copy(deep=True)
    settled.data.resolution = resolution
    build.settle_sampling_(settled, folder)
    settled.data.style_dir = str(images.resolve())
    settled.data.validation_dir = str(held_out.resolve()) if held_out else None
    settled.compute.dtype = build.dtype_name(build.choose_dtype(config.compute.dtype, device))
    if config.model == "auto":
        settled.model = "tiny" if build.is_tiny(folder) else build.BIG_MODEL
    return Plan(settled, folder, device, build.choose_dtype(config.compute.dtype, device), style, prompts)


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
    out.write_json("environment.json", build.environment(plan.config.model, plan.device, plan.dtype) | {"processes": ranks.world})
    return _work(plan, out, ranks, resumed=None)


def resume(plan: Plan, run_folder: Path, *, force: bool = False) -> dict[str, Any]:
    """Go on with a run as if it had never been stopped.

    Raises:
        ConfigError: settings or images changed since, and not `force`; the message shows how.
        JournalError: the journal is damaged or of another model.
    """
    out = RunFolder(run_folder)
    changes = changed_settings(load_config(run_folder / "config.yaml"), plan.config) + _changed_data(plan, run_folder)
    if changes and not force:
        raise ConfigError(
            "other settings or images than the run was started with:\n  " + "\n  ".join(changes),
            "the same ones; the continued run would not be the run",
            "leave the changes out, or add --force to go on with them",
        )
    if not (run_folder / JOURNAL).exists():
        raise JournalError(
            f"no {JOURNAL} in {run_folder}", "the folder of a run that was started", "start it again without --resume"
        )
    ranks = join(plan.config.compute.rank_timeout)
    if not ranks.first:
        return follow(plan, ranks, run_folder)
    writer, journal = JournalWriter.reopen(run_folder / JOURNAL)
    if journal.torn_bytes:
        say(f"{JOURNAL}: cut off {journal.torn_bytes} bytes of a step that was not finished")
    writer.append(NoteEntry("resume", {"step": journal.steps_done, "changes": changes}))
    out.write_text("config.yaml", plan.config.to_yaml())
    return _work(plan, out, ranks, resumed=(writer, journal))


def follow(plan: Plan, ranks: Ranks, resumed: Path | None) -> dict[str, Any]:
    """What ranks other than the first do: the same steps, and not one file. A resumed run is read from its folder."""
    parts = _load(plan, ranks)
    first_step = bad_steps = 0
    if resumed is not None:
        journal = read_journal(resumed / JOURNAL)
        first_step, bad_steps = _restore_(parts, journal, resumed)
    check_ranks(ranks, parts.numbers)
    with stop_on_signal(lambda text: None) as stop:
        ranks.wants_stop = stop.is_set
        train(
            parts.objective,
            parts.batches,
            parts.numbers,
            parts.optimizer,
            build.probing(plan.config),
            build.schedule(plan.config),
            max_steps=plan.config.train.max_steps,
            first_step=first_step,
            bad_steps_before=bad_steps,
            after_step=lambda done: check_ranks(ranks, parts.numbers) if done % CHECK_RANKS_EVERY == 0 else None,
            stop_requested=ranks.stop_agreed,
            sum_over_ranks=ranks.sum,
        )
        check_ranks(ranks, parts.numbers)
    leave()
    return {}


def _work(plan: Plan, out: RunFolder, ranks: Ranks, resumed: tuple[JournalWriter, Journal] | None) -> dict[str, Any]:
    job, first_step, bad_steps = _start(plan, out, ranks, resumed)
    try:
        with stop_on_signal(say) as stop:
            ranks.wants_stop = stop.is_set
            if first_step:
                job.finish_step(first_step)  # whatever a kill left undone
            else:
                job.validate(0)
                job.sample(0)
            try:
                outcome = train(
                    job.parts.objective,
                    job.parts.batches,
                    job.parts.numbers,
                    job.parts.optimizer,
                    build.probing(plan.config),
                    build.schedule(plan.config),
                    max_steps=plan.config.train.max_steps,
                    first_step=first_step,
                    bad_steps_before=bad_steps,
                    on_step=job.on_step,
                    after_step=job.after_step,
                    stop_requested=ranks.stop_agreed,
                    sum_over_ranks=ranks.sum,
                )
                check_ranks(ranks, job.parts.numbers)
            except (TrainingDiverged, RankLost):
                job.checkpoint(job.steps_done)
                raise
        if outcome.stopped:
            job.checkpoint(outcome.steps_done)
        else:
            job.validate(outcome.steps_done)
            job.sample(outcome.steps_done)
            job.finish(outcome.steps_done)
        results = job.results(outcome)
    finally:
        job.close()
    leave()
    return results


def _load(plan: Plan, ranks: Ranks) -> Parts:
    """Encode the data, free the encoders, load and quantize the transformer."""
    config, device, dtype = plan.config, plan.device, plan.dtype
    if not ranks.first:
        ranks.wait()  # until the first rank has encoded everything; then all of it is in the cache
    encoded = style_data.encode(config, plan.model_folder, plan.style, plan.sample_prompts, device, dtype)
    if ranks.first:
        ranks.wait()
    transformer, scales, numbers = build.load_base(config, build.Place(plan.model_folder, device, dtype))
    batches = style_data.TrainingBatches(config, plan.style.train, encoded, device, ranks)
    header = journal_header(config, *build.fingerprints(transformer, scales))
    check_same_run(ranks, config, dataset_table(plan.style), header)
    return Parts(dtype, transformer, scales, numbers, build.optimizer(config), batches, encoded, header)


def _restore_(parts: Parts, journal: Journal, run_folder: Path) -> tuple[int, int]:
    """Bring the numbers to the journal's end. Returns the steps done and how many bad ones in a row come last."""
    build.check_journal_fits(journal, parts.header)
    checkpoints, problems = list_checkpoints(run_folder / "checkpoints")
    for problem in problems:
        say(f"warning: passed over a checkpoint: {problem}")
    first_step = restore_(checkpoints[-1] if checkpoints else None, journal, parts.numbers, parts.optimizer)
    return first_step, bad_steps_at_end(journal)


def _start(plan: Plan, out: RunFolder, ranks: Ranks, resumed: tuple[JournalWriter, Journal] | None) -> tuple[StyleJob, int, int]:
    """The parts of the run, brought to where it was, with everything that writes and shows."""
    config = plan.config
    parts = _load(plan, ranks)
    counts = style_data.token_counts(plan.style, parts.encoded.prompts)
    out.write_json("dataset.json", dataset_table(plan.style, counts))
    _warn_of_truncation(counts)
    first_step, bad_steps, validation = 0, 0, dict[int, float]()
    if resumed is None:
        writer = JournalWriter.create(out.path / JOURNAL, parts.header)
    else:
        writer, journal = resumed
        first_step, bad_steps = _restore_(parts, journal, out.path)
        validation = cut_metrics(out.path / "metrics.jsonl", first_step)
        say(f"going on at step {first_step}, the journal's end")
    check_ranks(ranks, parts.numbers)  # nobody goes on before all have read the checkpoints, for the old ones are dropped
    held_out = style_data.validation_batches(
        plan.style.validation, parts.encoded, plan.device, config.data.batch_size, config.train.seed
    )
    job = StyleJob(
        config=config,
        out=out,
        parts=parts,
        held_out=held_out,
        sampler=build.sampler(
            config,
            plan.model_folder,
            parts.transformer,
            parts.encoded.vae,
            plan.sample_prompts,
            parts.encoded.prompts,
            plan.device,
            plan.dtype,
        ),
        tracker=Tracker(out.path, config.train.max_steps, first_step),
        journal=writer,
        ranks=ranks,
        metadata=build.scales_metadata(config, parts.header["codes"]),
        validation=validation,
        steps_done=first_step,
    )
    return job, first_step, bad_steps


def _changed_data(plan: Plan, run_folder: Path) -> list[str]:
    """What is different from the run's dataset.json, image by image."""
    path = run_folder / "dataset.json"
    if not path.exists():  # stopped before it was written: nothing was trained on yet
        return []
    before = {row["file"]: [row[fact] for fact in DATA_FACTS] for row in json.loads(path.read_text(encoding="utf-8"))}
    now = {str(row["file"]): [row[fact] for fact in DATA_FACTS] for row in dataset_table(plan.style)}
    changes = [f"image {name} was removed" for name in before.keys() - now.keys()]
    changes += [f"image {name} was added" for name in now.keys() - before.keys()]
    for name in before.keys() & now.keys():
        changes += [f"image {name}: other {fact}" for fact, a, b in zip(DATA_FACTS, before[name], now[name], strict=True) if a != b]
    return sorted(changes)


def _warn_of_truncation(counts: dict[str, tuple[int, bool]]) -> None:
    cut = [name for name, (_, truncated) in counts.items() if truncated]
    if cut:
        say(f"warning: {len(cut)} of {len(counts)} captions are longer than the text encoders read, for example {cut[0]}")
