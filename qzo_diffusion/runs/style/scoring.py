"""Score any folder of pictures against prompts and a style's images, for `qzo-diffuse evaluate
--images`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from qzo_diffusion import devices, resources
from qzo_diffusion.core.errors import DataError
from qzo_diffusion.diffusion.images import BadImage, is_image_name, open_image
from qzo_diffusion.diffusion.listing import list_files
from qzo_diffusion.diffusion.prompts import read_prompt_file
from qzo_diffusion.evaluate import clip_score, style
from qzo_diffusion.evaluate.scorer import DEFAULT_SCORER, content_name, load_scorer
from qzo_diffusion.runs.style.natural_order import natural_key
from qzo_diffusion.runs.style.samples import report_reading
from qzo_diffusion.system import escape
from qzo_diffusion.system.console import report
from qzo_diffusion.system.files import prepare_file
from qzo_diffusion.system.reading import read_json
from qzo_diffusion.train.run_folder import RunFolder

SHOWN_PAIRS = 3
TABLE = "prompts.json"  # the table of pictures and prompts that `sample` writes


@dataclass(frozen=True)
class ScoreRequest:
    """Settings of scores. `prompts` may be None if a table in the folder names the prompt of each
    picture.
    """

    images: Path
    prompts: str | None = None
    style_dir: Path | None = None
    scorer: str | None = None
    output: Path | None = None
    batch_size: int = 16


def run(request: ScoreRequest) -> dict[str, Any]:
    """Score a folder and write the result.

    Raises:
        DataError: no pictures, numbers of pictures and prompts that differ, or none can be read.
        OutputError: the output can't be written.
    """
    pairs = _pairs(request)
    if request.output is not None:
        prepare_file(request.output)
    pictures, unusable = opened([path for path, _ in pairs], request.images)
    prompts = [prompt for path, prompt in pairs if path in pictures]
    contents = [clip_score.content_of(prompt) or prompt for prompt in prompts]
    name = request.scorer or DEFAULT_SCORER
    scorer = load_scorer(
        name, devices.choose_device("auto"), resources.embedded_scorer(), request.batch_size
    )
    features = scorer.image_features(list(pictures.values()))
    results: dict[str, Any] = {"scorer": {"name": scorer.name, "note": scorer.note}}
    results["clip_score"] = clip_score.score(scorer, features, contents)
    cosine = clip_score.cosines(features, scorer.text_features(contents))
    results["images"] = [
        {"file": _name(path, request.images), "prompt": prompt, "content": content, "clip": value}
        for path, prompt, content, value in zip(pictures, prompts, contents, cosine, strict=True)
    ]
    results["unusable"] = unusable
    if request.style_dir is not None:
        paths = images_in(request.style_dir)
        own, bad = opened(paths, request.style_dir)
        names = [path.relative_to(request.style_dir).as_posix() for path in own]
        trained = scorer.image_features(list(own.values()))
        results["style"] = style.score(style.Pictures(features), trained, names, trained[:0])
        results["unusable"] += bad
    if len(pictures) == 1:
        _warn("one picture has no interval; its score says little")
    if request.output is not None:
        RunFolder(request.output.parent).write_json(request.output.name, results)
    return results


def in_words(found: Mapping[str, Any]) -> str:
    """Return the score of a folder as text, from `run`'s `clip_score`."""
    name = content_name(found["note"])
    by = found["note"] or found["model"]
    return f"{name[0].upper()}{name[1:]} {found['mean']:.4f} of {found['n']} images, by {by}"


def _pairs(request: ScoreRequest) -> list[tuple[Path, str]]:
    table = request.images / TABLE
    if request.prompts is None:
        if not table.is_file():
            raise DataError(
                f"no --prompts, and no {TABLE} in {request.images}",
                "a prompt for each picture",
                "pass --prompts FILE with one prompt a line, in the order of the pictures' names "
                "(2.png before 10.png)",
            )
        return _from_table(request.images, table)
    paths = (
        [request.images / file for file, _ in _rows(table)]
        if table.is_file()
        else _in_natural_order(request.images)
    )
    prompts = _read_prompts(resources.find_file(request.prompts, "prompts"))
    if len(prompts) != len(paths):
        raise DataError(
            f"{len(paths)} pictures in {request.images} and {len(prompts)} prompts in "
            f"{request.prompts}",
            "one prompt for each picture, in the order of the pictures' names",
            "take out the pictures or lines that belong to nothing",
        )
    pairs = list(zip(paths, prompts, strict=True))
    if not table.is_file() and paths != sorted(paths):
        _report_order(pairs, request.images)
    return pairs


def _read_prompts(file: Path) -> list[str]:
    """Read the prompts of a file, and report how they were read."""
    found = read_prompt_file(file)
    report_reading(found)
    return found.texts


def _in_natural_order(folder: Path) -> list[Path]:
    paths = images_in(folder, own_outputs=True)
    return sorted(paths, key=lambda path: natural_key(path.relative_to(folder)))


def _report_order(pairs: Sequence[tuple[Path, str]], folder: Path) -> None:
    """Show the first pairs of picture and prompt: names sorted as text would give other pairs."""
    shown = [
        f"  {escape.one_line(_name(path, folder))} <- {escape.one_line(prompt)}"
        for path, prompt in pairs[:SHOWN_PAIRS]
    ]
    head = "note: pictures are taken in the order of the numbers in their names; the first pairs:"
    report("\n".join([head, *shown]))


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _from_table(folder: Path, table: Path) -> list[tuple[Path, str]]:
    pairs = [(folder / file, prompt) for file, prompt in _rows(table)]
    if not pairs:
        raise DataError(f"{table} names no picture", "at least one", "pass --prompts FILE")
    return pairs


def _rows(table: Path) -> list[tuple[str, str]]:
    """Return file names and prompts; a name must lie in the folder itself."""
    try:
        rows = [(str(row["file"]), str(row["prompt"])) for row in read_json(table)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{table} can't be used: {error}", "a list of {file, prompt}", "pass --prompts FILE"
        ) from None
    for file, _ in rows:
        if Path(file).name != file:
            raise DataError(
                f"{table} names {file!r}", "files in the same folder", "correct or remove it"
            )
    return rows


def images_in(folder: Path, *, own_outputs: bool = False) -> list[Path]:
    if not folder.is_dir():
        raise DataError(
            f"there is no folder {folder}", "a folder of pictures", "pass the path of one"
        )
    found = list_files(folder, own_outputs=own_outputs).files
    paths = [path for path in found if is_image_name(path)]
    if not paths:
        raise DataError(f"no picture in {folder}", "at least one", "pass another folder")
    return paths


def opened(paths: list[Path], folder: Path) -> tuple[dict[Path, Image.Image], list[dict[str, str]]]:
    """Return the pictures that can be read, and the others with reasons, which are reported and
    counted.
    """
    opened, unusable = {}, []
    for path in paths:
        try:
            opened[path] = open_image(path).image
        except BadImage as error:
            name = _name(path, folder)
            unusable.append({"file": name, "reason": error.reason})
            _warn(f"{escape.one_line(name)} is left out: {error.reason}")
    if not opened:
        raise DataError(
            f"none of the {len(paths)} pictures in {folder} can be read",
            "at least one",
            "replace the files",
        )
    return opened, unusable


def _warn(text: str) -> None:
    report(f"warning: {text}")
