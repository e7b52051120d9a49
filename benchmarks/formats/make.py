"""Make small random files of each format, with the pipeline folder that they belong to."""

from pathlib import Path

from tests.gguf_pictures import write_gguf
from tests.small_models import sd3_transformer
from tests.small_pipeline import write_pipeline

WIDE = 4  # heads of 64: a block of K types has 256 inputs


def make_gguf(folder: Path, kind: str) -> str:
    """Write a pipeline with a transformer that all types fit, and the transformer as GGUF.

    Returns the command that tunes it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = write_pipeline(folder / "pipeline")
    model = sd3_transformer(layers=2, width=WIDE)
    model.save_pretrained(place / "transformer")
    file = write_gguf(folder / f"small-{kind}.gguf", model, kind)
    return (
        f"qzo-diffuse train --model {place} --transformer {file} --style-dir IMAGES "
        "--caption 'a picture' --max-steps 20"
    )
