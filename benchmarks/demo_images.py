"""Write the images that `make demo` trains on: a candidate of `benchmarks.pictures`.

`python -m benchmarks.demo_images --data FOLDER --style NAME` with the folder of `emoji64.npz` and
`meta.json`. Forty to train on and sixteen held out. None is of a concept that a shipped prompt
names, so that pictures show what was carried over and not what was copied."""

import argparse
import json
from pathlib import Path

from PIL import Image

from benchmarks.pictures.candidates import CANDIDATES, chosen
from benchmarks.tiny.drawings import Drawings, taught_concepts
from qzo_diffusion import resources

FOLDER = resources.PACKAGE / "demo_images"


def write(folder: Path, drawings: Drawings) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metadata.jsonl").open("w") as captions:
        for image, name in zip(drawings.images, drawings.names, strict=True):
            file = f"{name.replace(' ', '_').lower()}.png"
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / file, optimize=True)
            captions.write(json.dumps({"file_name": file, "text": name}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--style", choices=CANDIDATES, required=True)
    options = parser.parse_args()
    train, held_out = chosen(options.style, options.data, taught_concepts())
    folder = FOLDER / options.style
    write(folder / "train", train)
    write(folder / "held_out", held_out)
    print(f"{len(train)} and {len(held_out)} images -> {folder}")


if __name__ == "__main__":
    main()
