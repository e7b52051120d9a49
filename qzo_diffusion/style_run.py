"""What `qzo-diffuse train` does from the first line to the last."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from PIL import Image
from torch import nn

from qzo_diffusion import build, resources, style_data
from qzo_diffusion.config import Config
from qzo_diffusion.core.errors import ConfigError, DataError, TrainingDiverged
from qzo_diffusion.core.parametrize import Parametrization
from qzo_diffusion.core.scales import ScaleSet
from qzo_diffusion.core.spsa import mean_loss
from qzo_diffusion.diffusion import sd3
from qzo_diffusion.diffusion.flow_matching import Batch, velocity_loss
from qzo_diffusion.diffusion.prompts import read_prompts
from qzo_diffusion.diffusion.sampling import Sampler, grid, mean_saturation
from qzo_diffusion.diffusion.style_folder import StyleFolder, dataset_table, read_style_folder, summary
from qzo_diffusion.train.loop import Outcome, train
from qzo_diffusion.train.run_folder import RunFolder
from qzo_diffusion.train.tracking import Tracker


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
    style = read_style_folder(
        Path(config.data.style_dir),
        resolution=resolution,
        caption=config.data.caption,
        trigger=config.data.trigger,
        repeats=config.data.repeats,
        strict=config.data.strict,
        validation_dir=Path(config.data.validation_dir) if config.data.validation_dir else None,
        seed=config.train.seed,
    )
    if not style.train:
        raise DataError("no image to train on", "at least one", "give more images or a separate --validation-dir")
    default = "tiny_grid.txt" if build.is_tiny(folder) else "grid.txt"
    prompts = read_prompts(resources.find_file(config.sample.prompts or default, "prompts"), config.data.trigger)
    settled = config.model_copy(deep=True)
    settled.model, settled.data.resolution = str(config.model if config.model != "auto" else folder_name(folder)), resolution
    return Plan(settled, folder, device, build.choose_dtype(config.compute.dtype, device), style, prompts)


def folder_name(folder: Path) -> str:
    return "tiny" if build.is_tiny(folder) else build.BIG_MODEL


@dataclass
class StyleRun:
    """The parts of a run that is under way."""

    plan: Plan
    out: RunFolder
    transformer: nn.Module
    scales: ScaleSet
    numbers: Parametrization
    batches: style_data.TrainingBatches
    held_out: list[Batch]
    sampler: Sampler
    tracker: Tracker
    columns: list[list[Image.Image]] = field(default_factory=list)
    titles: list[str] = field(default_factory=list)
    validation: dict[int, float] = field(default_factory=dict)

    def objective(self, batch: Batch) -> torch.Tensor:
        return velocity_loss(self.transformer, batch, self.plan.dtype)

    def sample(self, step: int) -> None:
        """A grid of this step; a failure is told and training goes on."""
        if step in self.sampled_steps:
            return
        try:
            with self.scales.showing(self.numbers.view()):
                images = self.sampler.images()
            self.columns.append(images)
            self.titles.append(f"step {step}")
            grid([images], [f"step {step}"]).save(self.out.path / "samples" / f"step_{step:06d}.png")
            grid(self.columns, self.titles).save(self.out.path / "samples" / "grid.png")
        except (RuntimeError, OSError, ValueError) as error:
            self.tracker.say(f"warning: no samples at step {step}: {error}")

    @property
    def sampled_steps(self) -> list[int]:
        return [int(title.split()[-1]) for title in self.titles]

    def validate(self, step: int) -> None:
        if not self.held_out or step in self.validation:
            return
        with self.scales.showing(self.numbers.view()):
            self.validation[step] = mean_loss(self.objective, self.held_out)
        self.tracker.on_validation(step, self.validation[step])

    def after_step(self, steps_done: int) -> None:
        config = self.plan.config
        if config.train.validate_every and steps_done % config.train.validate_every == 0:
            self.validate(steps_done)
        if config.sample.every and steps_done % config.sample.every == 0:
            self.sample(steps_done)

    def save(self, name: str, steps: int) -> None:
        self.numbers.merge_()
        facts = build.scales_metadata(self.plan.config, self.plan.config.model, self.transformer, steps)
        self.out.save_scales(name, self.scales.tensors(), facts)

    def results(self, outcome: Outcome) -> dict[str, Any]:
        steps = sorted(self.validation)
        loss = {"start": self.validation[steps[0]], "end": self.validation[steps[-1]]} if steps else None
        saturation = [mean_saturation(self.columns[0]), mean_saturation(self.columns[-1])] if self.columns else None
        return {
            "run": str(self.out.path),
            "steps": outcome.steps_done,
            "skipped": outcome.skipped,
            "stopped": outcome.stopped,
            "validation_loss": loss,
            "sample_saturation": {"start": saturation[0], "end": saturation[1]} if saturation else None,
        }


def start(plan: Plan, output_dir: Path) -> StyleRun:
    """Make the run's folder, encode the data, free the encoders, load and quantize the transformer."""
    config, device, dtype = plan.config, plan.device, plan.dtype
    out = RunFolder(output_dir)
    out.write_text("config.yaml", config.to_yaml())
    out.write_json("environment.json", build.environment(config.model, device, dtype))
    encoded = style_data.encode(config, plan.model_folder, plan.style, plan.sample_prompts, device, dtype)
    counts = style_data.token_counts(plan.style, encoded.prompts)
    out.write_json("dataset.json", dataset_table(plan.style, counts))
    warn_of_truncation(counts)
    transformer = build.quantized_transformer(config, plan.model_folder, device, dtype)
    scales, numbers = build.scales_and_numbers(config, transformer)
    return StyleRun(
        plan=plan,
        out=out,
        transformer=transformer,
        scales=scales,
        numbers=numbers,
        batches=style_data.TrainingBatches(config, plan.style.train, encoded, device),
        held_out=style_data.validation_batches(plan.style.validation, encoded, device, config.data.batch_size, config.train.seed),
        sampler=make_sampler(plan, transformer, encoded),
        tracker=Tracker(out.path, config.train.max_steps),
    )


def make_sampler(plan: Plan, transformer: nn.Module, encoded: style_data.Encoded) -> Sampler:
    config = plan.config
    side = config.data.resolution
    assert side is not None
    return Sampler(
        transformer,
        sd3.load_scheduler(plan.model_folder),
        encoded.vae,
        [encoded.prompts[prompt] for prompt in plan.sample_prompts],
        encoded.prompts[config.sample.negative_prompt],
        width=side,
        height=side,
        steps=config.sample.steps,
        guidance=config.sample.guidance,
        seed=config.sample.seed,
        batch_size=config.sample.batch_size,
        device=plan.device,
        dtype=plan.dtype,
    )


def warn_of_truncation(counts: dict[str, tuple[int, bool]]) -> None:
    cut = [name for name, (_, truncated) in counts.items() if truncated]
    if cut:
        say(f"warning: {len(cut)} of {len(counts)} captions are longer than the text encoders read, for example {cut[0]}")


def run(plan: Plan, output_dir: Path) -> dict[str, Any]:
    """Train, and leave a run folder. Returns the figures for `--json`.

    Raises:
        TrainingDiverged: after everything was saved.
    """
    job = start(plan, output_dir)
    optimizer, schedule = build.optimizer_and_schedule(plan.config)
    try:
        with stop_on_signal() as stop:
            job.validate(0)
            job.sample(0)
            try:
                outcome = train(
                    job.objective,
                    job.batches,
                    job.numbers,
                    optimizer,
                    build.probing(plan.config),
                    schedule,
                    max_steps=plan.config.train.max_steps,
                    on_step=job.tracker.on_step,
                    after_step=job.after_step,
                    stop_requested=stop.is_set,
                )
            except TrainingDiverged:
                job.save("final", plan.config.train.max_steps)
                raise
        if outcome.stopped:
            job.save(f"checkpoints/step_{outcome.steps_done:06d}", outcome.steps_done)
            return job.results(outcome)
        job.validate(outcome.steps_done)
        job.sample(outcome.steps_done)
        job.save("final", outcome.steps_done)
        return job.results(outcome)
    finally:
        job.tracker.close()
        job.scales.close()


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """Ctrl-C or SIGTERM sets the event, so that the step in hand is finished; a second one interrupts at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def request(_number: int, _frame: FrameType | None) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()
        say("\nstopping after this step; once more to stop at once")

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def default_output_dir(now: str, style_dir: str) -> Path:
    """outputs/<date>-<name>/ with a number behind it where that exists."""
    base = Path("outputs") / f"{now}-{Path(style_dir).resolve().name or 'run'}"
    candidate, count = base, 2
    while candidate.exists():
        candidate, count = base.with_name(f"{base.name}-{count}"), count + 1
    return candidate
