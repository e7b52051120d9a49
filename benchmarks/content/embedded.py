"""The embedded model, its scorer and the shipped prompts as they were at one commit.

Figures of this benchmark stay comparable when the model that ships is made anew.
"""

import contextlib
import io
import json
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from qzo_diffusion import resources

REVISION = "2c28506"
PARTS = ("qzo_diffusion/models", "prompts")


def unpack(work: Path, revision: str = REVISION) -> Path:
    """The folder that stands for the package at `revision`, with `models/` in it.

    Raises:
        RuntimeError: this is no clone with that commit.
    """
    package = work / f"embedded_{revision}" / "qzo_diffusion"
    if (package / "models").is_dir():
        return package
    command = ["git", "archive", "--format=tar", revision, *PARTS]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"`{' '.join(command)}` failed: {done.stderr.decode().strip()}; expected a clone with "
            f"commit {revision}; fetch the whole history"
        )
    aside = work / f".embedded_{revision}"
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(aside, filter="data")
    aside.rename(package.parent)
    return package


@contextlib.contextmanager
def embedded(package: Path) -> Iterator[None]:
    """While open, the package takes its model, scorer and prompts from the folder `package`."""
    with mock.patch.object(resources, "PACKAGE", package):
        yield


def taught(package: Path) -> list[str]:
    """The concepts that the model draws."""
    names: list[str] = json.loads((package / "models/tiny/concepts.json").read_text())["concepts"]
    return names
