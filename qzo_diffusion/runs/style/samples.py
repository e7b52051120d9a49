"""Show a style run while it goes on: a column of pictures every few steps, and all columns side by
side.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from qzo_diffusion import devices, resources
from qzo_diffusion.core.errors import OutputError
from qzo_diffusion.diffusion.flow_matching import Batch
from qzo_diffusion.diffusion.prompts import Prompts, read_prompt_file
from qzo_diffusion.diffusion.sampling import (
    Sampler,
    grid,
    join_columns,
    load_picture,
    mean_chroma,
    mean_saturation,
    save_picture,
)
from qzo_diffusion.diffusion.trigger import Trigger, with_and_without
from qzo_diffusion.runs.report import step_grids
from qzo_diffusion.system import escape
from qzo_diffusion.system.console import report
from qzo_diffusion.train.tracking import Tracker


def chosen_prompts(name: str, word: str | None, trigger: Trigger | None) -> Prompts:
    """Return the prompts of a file; half of those of an included file get the captions' trigger.

    A user's own file stays as it is: it says itself where the trigger stands.
    """
    file = resources.find_file(name, "prompts")
    found = read_prompt_file(file, word)
    if resources.shipped("prompts").resolve() not in file.resolve().parents:
        return found
    pairs = zip(found.prompts, with_and_without(found.texts, trigger), strict=True)
    return replace(found, prompts=[replace(prompt, text=text) for prompt, text in pairs])


def report_reading(prompts: Prompts) -> None:
    """Report how a file of prompts was read, if that is not plain."""
    for note in prompts.notes:
        report(f"note: {note}")


def prompt_table(prompts: Prompts, trigger: Trigger | None) -> list[dict[str, Any]]:
    """Return rows of samples/prompts.json; if captions have a trigger, also whether the prompt has
    it.
    """
    return [
        {"row": at, **one.row}
        | ({} if trigger is None else {"trigger": trigger.word, "with": trigger.is_in(one.text)})
        for at, one in enumerate(prompts.prompts)
    ]


def prompts_in_words(prompts: Sequence[str], trigger: Trigger | None) -> str:
    text = f"{len(prompts)} to sample"
    if trigger is None:
        return text
    count = sum(map(trigger.is_in, prompts)) or "none"
    return f"{text}, {count} with the captions' trigger {escape.one_line(repr(trigger.word))}"


@dataclass
class Pictures:
    """`runs.plan.Callbacks` of a style run; `folder` is the run's samples/."""

    folder: Path
    sampler: Sampler
    tracker: Tracker
    held_out: Sequence[Batch]
    every: int

    def show(self, step: int) -> None:
        """Draw the pictures of a step; a failure only warns."""
        path = self.folder / f"step_{step:06d}.png"
        if path.exists():
            return
        try:
            column = grid([self.drawn(step)], [f"step {step}"])
            save_picture(column, path)
            self.tracker.on_pictures(step, column)
            save_picture(join_columns(self.columns()), self.folder / "grid.png")
        except (RuntimeError, OSError, ValueError, OutputError) as error:
            full = devices.out_of_memory(error)
            more = "; stop the run, and go on with sample.batch_size=1" if full else ""
            self.tracker.report(f"warning: no samples at step {step}: {error}{more}")

    def drawn(self, step: int) -> list[Image.Image]:
        """Return the pictures of a step as the transformer is now."""
        return self.sampler.images()

    def columns(self) -> list[Image.Image]:
        return [load_picture(path) for _, path in step_grids(self.folder.parent)]

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
