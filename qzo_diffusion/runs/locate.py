"""The one answer to "which run, checkpoint or delta does this path mean?".

    run/                          a run; its tuned scales are in final/
    run/final                     the same
    run/checkpoints/step_000100   one step of a run
    run/checkpoints               the newest step of a run
    export/                       a delta, a mix or a replay: scales and settings in one folder
    .../scales.safetensors        the folder that holds the file

A path may be relative to any of these folders. This module reads names and config.yaml, no tensor.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qzo_diffusion.config.files import read_yaml
from qzo_diffusion.core.errors import ConfigError, OutputError
from qzo_diffusion.system.files import SCALES

Kind = Literal["style", "llm"]
CHECKPOINT = re.compile(r"step_(\d+)")
SETTINGS = "config.yaml"
_REMEDY = "give a run folder, one of its checkpoints, or an exported delta"
_IN_WORDS: dict[Kind, str] = {"style": "of pictures", "llm": "of a language model"}
_VERBS: dict[Kind, str] = {
    "style": "train, sample, mix, evaluate, report and export",
    "llm": "llm train --resume, llm evaluate, report and export",
}


@dataclass(frozen=True)
class Located:
    """A path as a person gave it, and the run that it belongs to.

    Attributes:
        path: as given.
        place: the same path, absolute; for a file its folder.
        folder: the run's folder, which holds config.yaml; None without a run.
        step: the step of a checkpoint; None for a whole run.
    """

    path: Path
    place: Path
    folder: Path | None
    step: int | None

    def run(self) -> Path:
        """The run's folder. Raises OutputError without a run."""
        if self.folder is None:
            raise OutputError(f"no {SETTINGS} in {self.path}", "the folder of a run", _REMEDY)
        return self.folder

    def settings(self) -> Path:
        """The run's config.yaml. Raises OutputError without a run."""
        return self.run() / SETTINGS

    def kind(self) -> Kind:
        """The kind of the run by its settings: a run of `llm train` names its task."""
        return "llm" if "task" in read_yaml(self.settings()) else "style"

    def need(self, kind: Kind) -> "Located":
        """Return itself if the run is of this kind.

        Raises:
            OutputError: there is no run.
            ConfigError: the run is of the other kind.
        """
        found = self.kind()
        if found != kind:
            raise ConfigError(
                f"{self.path} is a run {_IN_WORDS[found]}",
                f"a run {_IN_WORDS[kind]}",
                f"give another run; this one is for {_VERBS[found]}",
            )
        return self

    def scales(self) -> Path:
        """The folder with the tuned scales. Raises OutputError without any."""
        for folder in (self.place, self.place / "final"):
            if (folder / SCALES).is_file():
                return folder
        raise OutputError(
            f"no tuned scales in {self.path}",
            f"final/{SCALES}",
            "give the folder of a finished run, or one of its checkpoints",
        )


def locate(path: Path) -> Located:
    """Find the run, checkpoint or delta that `path` means. A missing path raises no error.

    A link is followed only if the path as given leads to no run.
    """
    given = Path(os.path.abspath(path))
    found = _located(path, given)
    return found if found.folder is not None else _located(path, given.resolve())


def _located(path: Path, place: Path) -> Located:
    if place.is_file():
        place = place.parent
    if place.name == "checkpoints":
        place = max(_checkpoints(place), default=place)
    folder = next((f for f in _candidates(place) if (f / SETTINGS).is_file()), None)
    step = CHECKPOINT.fullmatch(place.name)
    return Located(path, place, folder, int(step[1]) if step else None)


def _candidates(place: Path) -> list[Path]:
    if place.parent.name == "checkpoints":
        return [place, place.parent.parent]
    return [place, place.parent] if place.name in ("final", "checkpoints") else [place]


def _checkpoints(folder: Path) -> list[Path]:
    return [one for one in folder.glob("step_*") if CHECKPOINT.fullmatch(one.name)]


def to_resume(resume: str, output_dir: Path | None, outputs: Path = Path("outputs")) -> Path:
    """Return the run's folder that `--resume` means: `latest`, a run, or anything inside of one.

    Raises:
        OutputError: there is no run.
    """
    if resume == "latest":
        return output_dir or newest_run(outputs)
    return locate(Path(resume)).run()


def newest_run(outputs: Path) -> Path:
    """Return the folder below `outputs` whose journal or metrics were written last.

    Raises:
        OutputError: there is no run.
    """
    written = [
        path for name in ("journal.qzo", "metrics.jsonl") for path in outputs.glob(f"*/{name}")
    ]
    if not written:
        raise OutputError(
            f"no run in {outputs}", "a run to go on with", "give its folder: --resume PATH"
        )
    return max(written, key=lambda path: path.stat().st_mtime_ns).parent


def default_output_dir(outputs: Path, name: str) -> Path:
    """Return outputs/<name>, with a number added if that exists."""
    candidate, count = outputs / name, 2
    while candidate.exists():
        candidate, count = outputs / f"{name}-{count}", count + 1
    return candidate
