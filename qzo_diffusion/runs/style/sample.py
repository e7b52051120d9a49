"""Draw images of a prompt file for `qzo-diffuse sample`, with or without a run's tuned scales."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from qzo_diffusion import resources
from qzo_diffusion.config.arguments import unusual
from qzo_diffusion.config.files import load_config
from qzo_diffusion.config.style import Config
from qzo_diffusion.core.errors import ConfigError, OutputError
from qzo_diffusion.diffusion.prompts import Prompt, Prompts, parse_prompts, read_prompt_file
from qzo_diffusion.diffusion.sampling import grid
from qzo_diffusion.runs.locate import locate
from qzo_diffusion.runs.style import pipeline
from qzo_diffusion.runs.style.checks import check_sizes, check_words
from qzo_diffusion.runs.style.choose_model import choose_model, shipped_prompts
from qzo_diffusion.runs.style.drawing import load_drawing
from qzo_diffusion.runs.style.levels import with_levels
from qzo_diffusion.runs.style.samples import report_reading
from qzo_diffusion.runs.tuned import apply_, load_tuned
from qzo_diffusion.system.console import report
from qzo_diffusion.system.files import ANOTHER, check_empty, unfinished, write_folder
from qzo_diffusion.train.run_folder import RunFolder


@dataclass(frozen=True)
class SampleRequest:
    """Settings of samples.

    `strength` 0 is the base, 1 the tuned model; others interpolate or extrapolate the log-scales.
    `prompts` is a file, or the prompts themselves. None takes the run's own, or the default.
    """

    output_dir: Path
    model: str | None = None
    transformer: str | None = None
    family: str | None = None
    run: Path | None = None
    strength: float = 1.0
    tuned_between: Sequence[float] | None = None
    prompts: str | list[str] | None = None
    negative_prompt: str | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None


def run(request: SampleRequest) -> dict[str, Any]:
    """Write `samples/` in the output folder.

    Raises:
        ConfigError: a strength without a run.
        OutputError: the folder exists already, or the run has no tuned scales.
    """
    if request.run is None and request.strength not in (0, 1):
        got = f"--strength {request.strength:g} without --run"
        raise ConfigError(
            got,
            "a run, whose changes it scales",
            "add --run RUN, or leave --strength out for the base",
        )
    if request.run is None and request.tuned_between is not None:
        raise ConfigError(
            "--tuned-between without --run",
            "a run, whose tuned scales are used between the two noise levels",
            "add --run RUN, or leave --tuned-between out for the base",
        )
    if warning := unusual(request.strength, "--strength"):
        report(warning)
    check_empty(request.output_dir, ANOTHER)
    tuned = load_tuned(request.run) if request.run else None
    config = _config_of(request)
    _, why = choose_model(config.model)
    report(why)
    runtime = pipeline.find_runtime(config)
    prompts = _prompts(request, config, runtime.folder)
    report_reading(prompts)
    shape = pipeline.shape_of(config, runtime)
    check_sizes(shape, config.data.resolution or shape.native_resolution)
    check_words(config, shape.family, runtime.folder, prompts)
    drawing = load_drawing(config, runtime, [*prompts.texts, *prompts.negatives])
    if tuned is not None:
        apply_(drawing.transformer, drawing.scales, [(tuned, request.strength)])
    images = drawing.sampler(prompts.prompts).images()
    # made last, so that a failure leaves nothing
    out = RunFolder.create(request.output_dir, ANOTHER)
    sheet = grid([images], [request.run.name if request.run else "base"])
    with unfinished(out.path, ("samples",)):
        write_folder(
            out.path / "samples",
            lambda folder: _write_pictures(folder, images, prompts.prompts, sheet),
            marked=False,
        )
    return {
        "samples": str(out.path / "samples"),
        "images": len(images),
        "strength": request.strength,
        "tuned_between": config.sample.tuned_between,
    }


def _write_pictures(
    folder: Path, images: Sequence[Image.Image], prompts: Sequence[Prompt], sheet: Image.Image
) -> None:
    files = [f"{index:03d}.png" for index in range(len(images))]
    for image, name in zip(images, files, strict=True):
        image.save(folder / name)
    sheet.save(folder / "grid.png")
    table = [{"file": name, **prompt.row} for name, prompt in zip(files, prompts, strict=True)]
    RunFolder(folder).write_json("prompts.json", table)


def _config_of(request: SampleRequest) -> Config:
    """Return the run's own settings, or the defaults without a run; the user's choices override
    both.
    """
    config = Config()
    if request.run is not None:
        try:
            config = load_config(locate(request.run).need("style").settings())
        except OutputError as error:
            # scales alone: their codes are compared with the base, so it can't be a wrong one
            report(f"{error.got}: default settings are used")
    config = with_levels(config, request.tuned_between)
    if request.model is not None:
        config.model = request.model
    config.transformer = request.transformer or config.transformer
    config.family = request.family or config.family
    if isinstance(request.prompts, str):
        config.sample.prompts = request.prompts
    for name in ("seed", "steps", "guidance", "negative_prompt"):
        if getattr(request, name) is not None:
            setattr(config.sample, name, getattr(request, name))
    return config


def _prompts(request: SampleRequest, config: Config, folder: Path) -> Prompts:
    if isinstance(request.prompts, list):
        lines = [(f"--prompt {at}", text) for at, text in enumerate(request.prompts, start=1)]
        return parse_prompts(lines, config.data.trigger)
    default = shipped_prompts(folder, "grid")
    file = resources.find_file(config.sample.prompts or default, "prompts")
    return read_prompt_file(file, config.data.trigger)
