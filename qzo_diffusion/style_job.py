"""A style run that is under way: what happens between its steps, and what it leaves behind."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import nn

from qzo_diffusion import build, style_data
from qzo_diffusion.config import Config
from qzo_diffusion.core.journal import JournalWriter
from qzo_diffusion.core.optimizer import Optimizer
from qzo_diffusion.core.parametrization import Parametrization, tuned_scales
from qzo_diffusion.core.scales import ScaleSet
from qzo_diffusion.core.spsa import mean_loss
from qzo_diffusion.diffusion.flow_matching import Batch, velocity_loss
from qzo_diffusion.diffusion.sampling import Sampler, grid, join_columns, load_picture, mean_chroma, mean_saturation, save_picture
from qzo_diffusion.quant.base import fingerprint
from qzo_diffusion.train.checkpoint import drop_old, entry_of, save_checkpoint
from qzo_diffusion.train.distributed import Ranks
from qzo_diffusion.train.loop import Outcome, StepRecord
from qzo_diffusion.train.run_folder import RunFolder
from qzo_diffusion.train.tracking import Tracker

CHECK_RANKS_EVERY = 100
DATA_FACTS = ("sha256", "caption", "bucket", "split", "repeats")  # of an image; with others it is another run


@dataclass
class Parts:
    """What every process of a run has: the model, the trained numbers, and the batches."""

    dtype: torch.dtype
    transformer: nn.Module
    scales: ScaleSet
    numbers: Parametrization
    optimizer: Optimizer
    batches: style_data.TrainingBatches
    encoded: style_data.Encoded
    header: dict[str, Any]

    def objective(self, batch: Batch) -> torch.Tensor:
        return velocity_loss(self.transformer, batch, self.dtype)


@dataclass
class StyleJob:
    """What the first process does between two steps: it writes, validates and samples.

    Everything is done once, whether the run was stopped in between or not: what exists is not redone.
    """

    config: Config
    out: RunFolder
    parts: Parts
    held_out: list[Batch]
    sampler: Sampler
    tracker: Tracker
    journal: JournalWriter
    ranks: Ranks
    metadata: dict[str, str]
    validation: dict[int, float] = field(default_factory=dict)
    steps_done: int = 0

    def on_step(self, record: StepRecord) -> None:
        """Metrics first: after a kill they are cut back to the journal, and so never lack a step that it has."""
        self.tracker.on_step(record)
        self.journal.append(entry_of(record, self.config.train.seed))
        self.steps_done = record.step + 1

    def after_step(self, steps_done: int) -> None:
        if _due(CHECK_RANKS_EVERY, steps_done):
            check_ranks(self.ranks, self.parts.numbers)
        self.finish_step(steps_done)

    def finish_step(self, steps_done: int) -> None:
        """What is due after this step and not there yet."""
        train, sample = self.config.train, self.config.sample
        if _due(train.validate_every, steps_done):
            self.validate(steps_done)
        if _due(train.checkpoint_every, steps_done):
            self.checkpoint(steps_done)
        if _due(sample.every, steps_done):
            self.sample(steps_done)

    def validate(self, step: int) -> None:
        if not self.held_out or step in self.validation:
            return
        with self.parts.scales.showing(self.parts.numbers.view()):
            self.validation[step] = mean_loss(self.parts.objective, self.held_out)
        self.tracker.on_validation(step, self.validation[step])

    def sample(self, step: int) -> None:
        """A column of pictures for this step, and all columns side by side; a failure is told and training goes on."""
        path = self.out.path / "samples" / f"step_{step:06d}.png"
        if path.exists():
            return
        try:
            with self.parts.scales.showing(self.parts.numbers.view()):
                images = self.sampler.images()
            save_picture(grid([images], [f"step {step}"]), path)
            self.join_samples()
        except (RuntimeError, OSError, ValueError) as error:
            self.tracker.say(f"warning: no samples at step {step}: {error}")

    def join_samples(self) -> None:
        columns = self.sample_columns()
        if columns:
            save_picture(join_columns(columns), self.out.path / "samples" / "grid.png")

    def sample_columns(self) -> list[Image.Image]:
        return [load_picture(path) for path in sorted((self.out.path / "samples").glob("step_*.png"))]

    def checkpoint(self, step: int) -> None:
        folder = self.out.path / "checkpoints"
        if (folder / f"step_{step:06d}").exists():
            drop_old(folder, self.config.train.keep_checkpoints)  # a kill may have come in between
            return
        self.journal.sync()
        save_checkpoint(
            folder,
            self.parts.numbers,
            self.parts.optimizer,
            step=step,
            chain=self.journal.chain,
            metadata=self.metadata | {"qzo.steps": str(step)},
            validation_loss=self.validation.get(step),
            keep=self.config.train.keep_checkpoints,
        )

    def finish(self, step: int) -> None:
        self.journal.sync()
        self.out.save_scales("final", tuned_scales(self.parts.numbers), self.metadata | {"qzo.steps": str(step)})

    def results(self, outcome: Outcome) -> dict[str, Any]:
        """The figures for `--json`."""
        steps, columns = sorted(self.validation), self.sample_columns()
        colour = {
            name: {"start": measure([columns[0]]), "end": measure([columns[-1]])} if columns else None
            for name, measure in (("sample_chroma", mean_chroma), ("sample_saturation", mean_saturation))
        }
        return {
            "run": str(self.out.path),
            "steps": outcome.steps_done,
            "skipped": outcome.skipped,
            "stopped": outcome.stopped,
            "validation_loss": {"start": self.validation[steps[0]], "end": self.validation[steps[-1]]} if steps else None,
            "processes": self.ranks.world,
            "bytes_sent": self.ranks.bytes_sent,
        } | colour

    def close(self) -> None:
        self.tracker.close()
        self.journal.close()


def check_ranks(ranks: Ranks, numbers: Parametrization) -> None:
    """Every rank calls this after the same step; raises RankLost when the trained numbers of one are others."""
    if ranks.world > 1:
        ranks.check_equal(bytes.fromhex(fingerprint(numbers.state().items())), "trained numbers")


def check_same_run(ranks: Ranks, config: Config, data: Sequence[Mapping[str, Any]], header: Mapping[str, Any]) -> None:
    """Raises RankLost when a rank was started with another model, other images or settings; folders may differ by machine."""
    settings = config.model_dump(exclude={"data": {"style_dir", "validation_dir", "cache_dir"}, "sample": {"prompts"}})
    base = [header[name] for name in ("codes", "initial_scales")]
    images = [[row["file"], *(row[fact] for fact in DATA_FACTS)] for row in data]
    text = json.dumps([settings, base, images], sort_keys=True, default=str)
    ranks.check_equal(hashlib.blake2b(text.encode(), digest_size=16).digest(), "model, images or settings")


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def journal_header(config: Config, codes: str, scales: str) -> dict[str, Any]:
    """What the journal must say to be replayed from the base model alone."""
    return {
        "format": build.JOURNAL_FORMAT,
        "model": config.model,
        "codes": codes,
        "initial_scales": scales,
        "config": build.config_hash(config),
        "seed": config.train.seed,
        "directions": config.qzo.directions,
        "num_directions": config.qzo.num_directions,
        "parametrization": config.qzo.parametrization,
        "units": config.qzo.units,
        "layers": config.qzo.layers,
        "regions": config.qzo.regions,
        "examples": config.data.batch_size if config.qzo.per_example else None,
        "optimizer": config.train.optimizer,
        "quant": config.quant.model_dump(),
        "dtype": config.compute.dtype,
    }
