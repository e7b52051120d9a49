"""The directions that a base model's own styles have in common, for `qzo.subspace`.

The base draws pictures of prompts in each of several styles that it knows. Each style is then
followed from captions without its words by a few steps of Adam on the exact gradient, over the rows
that a run trains. Singular vectors of all gradients on these ways, and of where they led, are the
directions. This is done once for a base model; runs that use the file make forward passes alone
(docs/decisions/estimator.md D108).

    OUTPUT/settings.json         the settings, the styles and the prompts
    OUTPUT/pictures.png          the first things in each style, to look at
    OUTPUT/pictures/00 ...       the base's pictures of each style, captioned without its words
    OUTPUT/ways/00.safetensors   gradients and places of each style
    OUTPUT/subspace.safetensors  the result
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from qzo_diffusion import devices, resources
from qzo_diffusion.config.files import changed_settings, make_config
from qzo_diffusion.config.style import Config
from qzo_diffusion.core.errors import ConfigError, DataError, OutputError, TrainingDiverged
from qzo_diffusion.core.grouped import Grouped
from qzo_diffusion.diffusion.families.family import model_loss
from qzo_diffusion.diffusion.memory import MemoryPlan
from qzo_diffusion.diffusion.prompts import Prompt, Prompts, read_prompt_file
from qzo_diffusion.diffusion.sampling import grid, load_picture, save_picture
from qzo_diffusion.runs import build
from qzo_diffusion.runs.changes import MEMORY
from qzo_diffusion.runs.spanned import GRADIENTS, PLACES, spanned
from qzo_diffusion.runs.style import pipeline
from qzo_diffusion.runs.style.batches import TrainingBatches
from qzo_diffusion.runs.style.checks import check_sizes, check_words
from qzo_diffusion.runs.style.choose_model import resolve_model_, shipped_prompts
from qzo_diffusion.runs.style.drawing import load_drawing
from qzo_diffusion.runs.style.memory import memory_plan, resolve_rows_
from qzo_diffusion.runs.style.plan import StylePlan, make_plan
from qzo_diffusion.runs.subspace import FILE
from qzo_diffusion.system.console import quiet, report
from qzo_diffusion.system.files import check_empty, prepare_file, write_folder, write_whole
from qzo_diffusion.system.progress import Progress
from qzo_diffusion.system.reading import read_json
from qzo_diffusion.train.distributed import Ranks
from qzo_diffusion.train.run_folder import RunFolder, load_tensors

SETTINGS = {  # of the ways; each may be given otherwise
    "method": "fo-scales",
    "qzo": {"parametrization": "row", "layers": "image", "subspace": None},
    "data": {"batch_size": 16},
    "train": {"lr": 0.015, "max_steps": 32},
    "sample": {"every": 0},
}
SHOWN, CELL = 6, 128  # things of a style in the sheet, and their side
LABEL = 17  # characters above a column
METADATA = "metadata.jsonl"
EVERY = 8  # steps between two places of a way that are kept


@dataclass(frozen=True)
class SubspaceRequest:
    """Args:
    config: model, formats and layers; the method is fo-scales over rows.
    styles, prompts: files, a line for each; None takes those that ship for the model.
    count: of the directions.
    """

    config: Config
    output_dir: Path
    styles: str | None = None
    prompts: str | None = None
    count: int = 256


def run(request: SubspaceRequest) -> dict[str, Any]:
    """Write the file of directions; a second call goes on with what is missing.

    Raises:
        ConfigError: settings of another method, or of numbers other than rows.
        OutputError: the folder holds another model's ways, or those of other settings.
    """
    config, output = request.config, request.output_dir
    _check(config)
    runtime = pipeline.find_runtime(config)
    resolve_model_(config, runtime.folder)
    styles, prompts = _words(request, runtime)
    _same_or_new(output, config, styles, prompts)
    pictures = [output / "pictures" / f"{at:02d}" for at in range(len(styles))]
    ways = [output / "ways" / f"{folder.name}.safetensors" for folder in pictures]
    _check_whole(pictures, ways, len(prompts))
    report(_plan(config, runtime, len(prompts)).describe())
    _draw(config, runtime, prompts, dict(zip(pictures, styles, strict=True)))
    devices.release(runtime.device)  # what drew the pictures, before gradients ask for room
    sheet = output / "pictures.png"
    save_picture(_sheet(pictures, styles), sheet)
    report(f"look at {sheet}: a style that the base does not draw teaches nothing")
    _follow_all(config, dict(zip(ways, pictures, strict=True)), styles)
    if (output / FILE).exists():
        report(f"note: {output / FILE} is written anew, from the ways that are there")
    directions = spanned(ways, request.count)
    facts = {"styles": json.dumps(styles, ensure_ascii=False)}  # of several, the order is random
    write_whole(output / FILE, save(directions, facts))
    return {
        "file": str(output / FILE),
        "pictures": str(sheet),
        "styles": len(styles),
        "directions": len(next(iter(directions.values()))),
        "rows": sum(one.shape[1] for one in directions.values()),
    }


def _plan(config: Config, runtime: pipeline.Runtime, count: int) -> MemoryPlan:
    """Plan drawing and gradients, with what they fill in."""
    tried = config.model_copy(deep=True)
    resolve_rows_(tried, runtime, count, count)
    return memory_plan(tried, runtime, count, count)


def _check(config: Config) -> None:
    found = (config.method, config.qzo.parametrization)
    if found != ("fo-scales", "row"):
        raise ConfigError(
            "method={}, qzo.parametrization={} for a subspace".format(*found),
            "method=fo-scales and qzo.parametrization=row: exact gradients of rows",
            "leave both out, also of --config",
        )
    if config.train.max_steps < 1:
        raise ConfigError("train.max_steps=0", "at least one step of each style", "leave it out")


def _words(request: SubspaceRequest, runtime: pipeline.Runtime) -> tuple[list[str], list[str]]:
    """Styles and prompts, which the model can read and draw."""
    folder, config = runtime.folder, request.config
    styles = _lines(request.styles or shipped_prompts(folder, "styles"), "--styles")
    prompts = _lines(request.prompts or shipped_prompts(folder, "things"), "--prompts")
    shape = pipeline.shape_of(config, runtime)
    check_sizes(shape, config.data.resolution or shape.native_resolution)
    both = Prompts([Prompt(text) for style in styles for text in _styled(prompts, style)])
    check_words(config, shape.family, folder, both)
    return styles, prompts


def _lines(name: str, flag: str) -> list[str]:
    """The lines of a file, each once."""
    try:
        found = read_prompt_file(resources.find_file(name, "prompts"))
    except DataError as error:
        remedy = f"correct the file, or give {flag} another one"
        raise DataError(error.got, "a text file with one line for each", remedy) from None
    for note in found.notes:
        report(f"note: {flag}: {note}")
    once = list(dict.fromkeys(found.texts))
    if len(once) < len(found.texts):
        report(f"note: {flag}: {len(found.texts) - len(once)} lines are there twice")
    return once


def _styled(prompts: Sequence[str], style: str) -> list[str]:
    return [f"{prompt}, {style}" for prompt in prompts]


def _same_or_new(
    output: Path, config: Config, styles: Sequence[str], prompts: Sequence[str]
) -> None:
    """Begin the folder, or see that it belongs to the same settings and words."""
    wanted = {
        "settings": config.model_dump(exclude={"data": {"cache_dir"}}, mode="json"),
        "styles": list(styles),
        "prompts": list(prompts),
    }
    path = output / "settings.json"
    if not path.is_file():
        check_empty(output)
        prepare_file(path)
        RunFolder(output).write_json(path.name, wanted)
        return
    try:
        before = read_json(path)
        changed = [f"other {key}" for key in ("styles", "prompts") if before[key] != wanted[key]]
        changed += changed_settings(
            make_config(before["settings"]), config, ("data.cache_dir", *MEMORY)
        )
    except (OSError, ValueError, KeyError, TypeError, ConfigError):
        raise OutputError(
            f"{path} is damaged", "what this verb wrote there", "give another --output-dir"
        ) from None
    if changed:
        raise OutputError(
            f"{output} was begun otherwise: {', '.join(changed)}",
            "the same settings and words, to go on with what is missing",
            "give another --output-dir",
        )


def _check_whole(pictures: Sequence[Path], ways: Sequence[Path], count: int) -> None:
    """See that what an earlier call left can be gone on with.

    Raises:
        OutputError: a folder lacks pictures, or a way is damaged.
    """
    for folder in {path.parent for path in (*pictures, *ways)}:
        if folder.exists() and not folder.is_dir():
            raise _damaged(folder, "a folder", "made")
    for folder in pictures:
        names = [METADATA, *(f"{at:03d}.png" for at in range(count))]
        if folder.exists() and not all((folder / name).is_file() for name in names):
            raise _damaged(folder, f"{count} pictures and their captions", "drawn")
    for way in ways:
        try:
            if way.exists() and not any(GRADIENTS in name for name in load_tensors(way)[0]):
                raise ValueError
        except (OutputError, ValueError):
            raise _damaged(way, "gradients and places, as they were written", "followed") from None


def _damaged(path: Path, expected: str, made: str) -> OutputError:
    remedy = f"remove it and call again: it is {made} anew"
    return OutputError(f"{path} is damaged", expected, remedy)


def _draw(
    config: Config,
    runtime: pipeline.Runtime,
    prompts: Sequence[str],
    style_of: dict[Path, str],
) -> None:
    """Let the base draw the prompts in each style into a folder, captioned by the prompts alone;
    folders that are there stay.
    """
    style_of = {place: style for place, style in style_of.items() if not place.is_dir()}
    if not style_of:
        return
    texts = [text for style in style_of.values() for text in _styled(prompts, style)]
    drawing = load_drawing(config, runtime, texts)
    for target, style in Progress(style_of.items(), desc="draw styles", unit="style"):
        own = [Prompt(text) for text in _styled(prompts, style)]
        with quiet(True):
            images = drawing.sampler(own).images()

        def write(place: Path, images: list[Any] = images) -> None:
            lines = []
            for at, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
                image.save(place / f"{at:03d}.png")
                lines.append(json.dumps({"file_name": f"{at:03d}.png", "text": prompt}))
            (place / METADATA).write_text("\n".join(lines) + "\n", encoding="utf-8")

        target.parent.mkdir(parents=True, exist_ok=True)
        write_folder(target, write, marked=False)


def _sheet(pictures: Sequence[Path], styles: Sequence[str]) -> Image.Image:
    """Return the first things of each style, a column for each."""
    columns = [
        [load_picture(path).resize((CELL, CELL)) for path in sorted(folder.glob("*.png"))[:SHOWN]]
        for folder in pictures
    ]
    titles = [style if len(style) <= LABEL else f"...{style[-LABEL:]}" for style in styles]
    return grid(columns, titles)


def _follow_all(config: Config, pictures: dict[Path, Path], styles: Sequence[str]) -> None:
    """Write the way of each folder of pictures that is not there yet."""
    todo = [at for at, way in enumerate(pictures) if not way.is_file()]
    if not todo:
        return
    with Progress(
        total=len(todo) * config.train.max_steps, desc="follow styles", unit="step"
    ) as bar:
        for at, (way, folder) in enumerate(pictures.items()):
            if at not in todo:
                continue
            bar.set_postfix_str(styles[at])
            with quiet(True):
                plan = make_plan(_of_pictures(config, folder))
            prepare_file(way)
            write_whole(way, save(_follow(plan, styles[at], bar)))


def _of_pictures(config: Config, folder: Path) -> Config:
    settings = config.model_dump()
    settings["data"] |= {"style_dir": str(folder), "validation_dir": None}
    return make_config(settings)


def _follow(plan: StylePlan, style: str, bar: Progress) -> dict[str, Tensor]:
    """Return gradients [steps, rows] and places [steps / EVERY, rows] by name of θ and layer."""
    config, ranks = plan.config, Ranks()
    with quiet(True):
        loaded = plan.load_parts(ranks, plan.style, Prompts([]))
    batches = TrainingBatches(config, plan.style.train, loaded.encoded, plan.device, ranks)
    theta, adam = loaded.theta, build.adam(config)
    gradient = build.exact_gradients(loaded.transformer)
    assert isinstance(theta, Grouped)

    def losses(batch: Any) -> Tensor:
        return model_loss(plan.family, loaded.transformer, batch, plan.dtype)

    kept: dict[str, list[Tensor]] = {}
    for step in range(config.train.max_steps):
        slopes = gradient(losses, batches(step).micro_batches, theta)
        if not all(bool(slope.isfinite().all()) for slope in slopes.values()):
            raise TrainingDiverged(
                f"a gradient that is not finite at step {step} of the style {style}",
                "finite numbers",
                "give a lower train.lr or compute.dtype=float32, and another --output-dir",
            )
        adam.descend_(theta, slopes, config.train.lr)
        for key, slope in slopes.items():
            for layer in theta.layers(key):
                place = theta.place(key, layer)
                name = f"{key}/{layer}/"
                kept.setdefault(name + GRADIENTS, []).append(slope[place].cpu().clone())
                if (step + 1) % EVERY == 0:
                    there = theta.by_axis[key][place].cpu().clone()
                    kept.setdefault(name + PLACES, []).append(there)
        bar.update()
    return {name: torch.stack(of_step) for name, of_step in kept.items()}
