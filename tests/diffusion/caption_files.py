"""Images and metadata without content, and how their captions are read."""

import json
from pathlib import Path

from qzo_diffusion.diffusion.captions import Captions, read_captions


def images(folder: Path, *names: str) -> list[Path]:
    """Empty files: captions go by name, and what the images hold is not looked at."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return [folder / name for name in names]


def read(
    folder: Path,
    files: list[Path],
    fallback: str | None = None,
    trigger: str | None = None,
    other: Path | None = None,
) -> Captions:
    return read_captions(folder, files, fallback=fallback, trigger=trigger, other=other)


def metadata(folder: Path, *entries: object) -> None:
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
