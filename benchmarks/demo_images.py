"""Write the images that `make demo` trains on: Fluent mono drawings (MIT) of concepts that `tiny`
was taught in other styles.

`python -m benchmarks.demo_images --data FOLDER` with the folder of `emoji64.npz` and `meta.json`.
Forty to train on and sixteen held out, none of them a prompt of the sample grid, so that the grid
shows what was carried over and not what was copied."""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.tiny.drawings import load_drawings, taught_concepts
from qzo_diffusion import resources

STYLE = "fluent_mono"
TRAIN, HELD_OUT = 40, 16
FOLDER = resources.PACKAGE / "demo_images" / "fluent_mono"


def choose(seed: int = 0) -> tuple[list[str], list[str]]:
    prompts = (resources.shipped("prompts") / "tiny_grid.txt").read_text().splitlines()
    shown = {line.partition(",")[0] for line in prompts if not line.startswith("#")}
    free = [name for name in taught_concepts() if name not in shown]
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(free))
    names = [free[index] for index in order[: TRAIN + HELD_OUT]]
    return sorted(names[:TRAIN]), sorted(names[TRAIN:])


def write(folder: Path, names: list[str], data: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    drawings = load_drawings(data, {STYLE: ""}, names)
    with (folder / "metadata.jsonl").open("w") as captions:
        for image, name in zip(drawings.images, drawings.names, strict=True):
            file = f"{name.replace(' ', '_').lower()}.png"
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / file, optimize=True)
            captions.write(json.dumps({"file_name": file, "text": name}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    data = parser.parse_args().data
    train, held_out = choose()
    write(FOLDER / "train", train, data)
    write(FOLDER / "held_out", held_out, data)
    print(f"{len(train)} and {len(held_out)} images -> {FOLDER}")


if __name__ == "__main__":
    main()
