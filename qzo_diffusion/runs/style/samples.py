"""What a style run shows while it goes on: a column of pictures for every few steps, and all
columns side by side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from qzo_diffusion.core.errors import OutputError
from qzo_diffusion.diffusion.flow_matching import Batch
from qzo_diffusion.diffusion.sampling import (
    Sampler,
    grid,
    join_columns,
    load_picture,
    mean_chroma,
    mean_saturation,
    save_picture,
)
from qzo_diffusion.train.tracking import Tracker


@dataclass
class Pictures:
    """`training_job.Extras` of a style run; `folder` is the run's samples/."""

    folder: Path
    sampler: Sampler
    tracker: Tracker
    held_out: Sequence[Batch]
    every: int

    def show(self, step: int) -> None:
        """A failure is told and training goes on."""
        path = self.folder / f"step_{step:06d}.png"
        if path.exists():
            return
        try:
            save_picture(grid([self.sampler.images()], [f"step {step}"]), path)
            save_picture(join_columns(self.columns()), self.folder / "grid.png")
        except (RuntimeError, OSError, ValueError, OutputError) as error:
            self.tracker.say(f"warning: no samples at step {step}: {error}")

    def columns(self) -> list[Image.Image]:
        return [load_picture(path) for path in sorted(self.folder.glob("step_*.png"))]

    def results(self) -> dict[str, Any]:
        columns = self.columns()
        return {
            name: {"start": measure([columns[0]]), "end": measure([columns[-1]])}
            if columns
            else None
            for name, measure in (
                ("sample_chroma", mean_chroma),
                ("sample_saturation", mean_saturation),
            )
        }
