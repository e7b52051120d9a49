"""Check before anything heavy is loaded that the model can take the images and texts of a run."""

import re
from collections.abc import Iterator
from pathlib import Path

from qzo_diffusion.config.style import Config
from qzo_diffusion.diffusion.buckets import Bucket, check_positions
from qzo_diffusion.diffusion.families.family import Family
from qzo_diffusion.diffusion.pipeline_shape import PipelineShape
from qzo_diffusion.diffusion.prompts import Prompts
from qzo_diffusion.diffusion.style_folder import StyleFolder
from qzo_diffusion.diffusion.vocabulary import check_texts
from qzo_diffusion.system.console import report
from qzo_diffusion.system.texts import check_encodable

DISTILLED = r"turbo|schnell|lightning|hyper-?sd|\blcm|distill"  # in the names of models


def check_sizes(shape: PipelineShape, resolution: int, style: StyleFolder | None = None) -> None:
    """Check that the model has positions for every bucket or sample. Raises ConfigError."""
    shapes: dict[str, Bucket] = {"samples": (resolution, resolution)}
    if style is not None:
        shapes |= {sample.id: (sample.width, sample.height) for sample in style.samples}
    if most := shape.largest_side:
        check_positions(shapes, most)


def warn_of_distilled(shape: PipelineShape, config: Config) -> None:
    """Warn where a model was distilled to few steps, which the loss of its objective blurs."""
    names = [name for name in (config.transformer, config.model) if name is not None]
    told = [name for name in names if re.search(DISTILLED, name.lower())]
    if told or shape.distilled:
        report(
            f"warning: {(told or names)[0]} was distilled to few steps. Its pictures blur when it "
            "is trained by the error of its predictions; train the base model, or by --reward "
            "(docs/rewards.md)"
        )


def check_words(
    config: Config,
    family: Family,
    folder: Path,
    prompts: Prompts,
    style: StyleFolder | None = None,
) -> None:
    """Check every text against the tokenizers. Without the model, check only that it can be
    encoded.

    Raises:
        DataError: half of a surrogate pair, or a token without an embedding.
    """
    texts = list(_texts(config, prompts, style))
    for place, text in texts:
        check_encodable(text, place)
    if folder.is_dir():
        check_texts(folder, family, texts, t5=config.text.t5 != "none")


def _texts(
    config: Config, prompts: Prompts, style: StyleFolder | None
) -> Iterator[tuple[str, str]]:
    yield "sample.negative_prompt", config.sample.negative_prompt
    yield "--caption", config.data.caption or ""
    yield "--trigger", config.data.trigger or ""
    for prompt in prompts.prompts:
        yield prompt.place, prompt.text
        yield prompt.place, prompt.negative or ""
    for sample in style.samples if style else []:
        yield sample.caption_place or sample.id, sample.caption
