"""The subspace of the embedded model (`qzo.subspace=tiny`): `python -m benchmarks.subspace --data
FOLDER --work FOLDER`.

Each style that the model was taught (three drawn ones, and the treatments laid over one of them) is
followed from captions without a style by 32 steps of Adam on the exact gradient, over the rows that
`qzo.layers=image` names. Singular vectors of all gradients on these ways, and of where they led,
are the directions, longer the more of them they hold; token-wise layers apart from the others.
Styles that were set aside are not used. Ways stay in --work, and a call goes on with what is
missing. FOLDER of the data holds `emoji64.npz` and `meta.json`."""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from benchmarks.content.cells import on_folder
from benchmarks.content.embedded import taught
from benchmarks.content.methods import merged
from benchmarks.pictures.candidates import CANDIDATES, Candidate, candidate_folder
from benchmarks.pictures.methods import COMPARED
from benchmarks.tiny.treatments import TAUGHT
from qzo_diffusion import resources
from qzo_diffusion.config.files import make_config
from qzo_diffusion.core.grouped import Grouped
from qzo_diffusion.core.oracle import exact_gradient
from qzo_diffusion.diffusion.families.family import model_loss
from qzo_diffusion.quant.load import handles_of
from qzo_diffusion.runs import build
from qzo_diffusion.runs.style.batches import TrainingBatches
from qzo_diffusion.runs.style.plan import make_plan
from qzo_diffusion.runs.subspace import FILE
from qzo_diffusion.train.distributed import Ranks

STEPS, IMAGES, RATE, SEED = 32, 16, 0.015, 5
EVERY = 8  # steps between two places of a way that are kept
DIRECTIONS = 256
PLACES = 3.0  # weight of a place over that of a gradient
DRAWN = ("noto", "twemoji", "fluent_flat")


def styles() -> dict[str, Candidate]:
    treated = {name.replace(" ", "_"): Candidate("fluent_flat", name) for name in TAUGHT}
    return {name: Candidate(name) for name in DRAWN} | treated


def follow(name: str, data: Path, work: Path) -> dict[str, Tensor]:
    """Return gradients [steps, n] and places [steps / EVERY, n] of a style by name of θ."""
    folder = candidate_folder(name, data, work, taught(resources.PACKAGE))
    own = merged(on_folder(folder, work / "cache", SEED, STEPS), {"data": {"batch_size": IMAGES}})
    config = make_config(merged(COMPARED["first_order_0.01"], own))
    plan = make_plan(config)
    loaded, ranks = plan.load_parts(Ranks(), plan.style, plan.prompts), Ranks()
    batches = TrainingBatches(config, plan.style.train, loaded.encoded, plan.device, ranks)
    theta, adam = loaded.theta, build.adam(config)
    assert isinstance(theta, Grouped)

    def losses(batch: Any) -> Tensor:
        return model_loss(plan.family, loaded.transformer, batch, plan.dtype)

    kept: dict[str, list[Tensor]] = {}
    for step in range(STEPS):
        handles = handles_of(loaded.transformer)
        slopes = exact_gradient(losses, batches(step).micro_batches, theta, handles)
        adam.descend_(theta, slopes, RATE)
        for key, slope in slopes.items():
            for layer in theta.layers(key):
                place = theta.place(key, layer)
                kept.setdefault(f"{key}/{layer}/gradients", []).append(slope[place].clone())
                if (step + 1) % EVERY == 0:
                    there = theta.by_axis[key][place].clone()
                    kept.setdefault(f"{key}/{layer}/places", []).append(there)
    return {name: torch.stack(of_step) for name, of_step in kept.items()}


def spanned(ways: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return directions [k, rows] by layer; z = c B has the mean square 1, as signs have."""
    layers = [name.rpartition("/")[0] for name in ways[0] if name.endswith("/gradients")]
    found: dict[str, Tensor] = {}
    for key in sorted({layer.partition("/")[0] for layer in layers}):
        own = [layer for layer in layers if layer.partition("/")[0] == key]

        def rows(way: dict[str, Tensor], kind: str, own: list[str] = own) -> Tensor:
            return torch.cat([way[f"{layer}/{kind}"] for layer in own], dim=1)

        places = torch.cat([rows(way, "places") for way in ways])
        slopes = torch.cat([_unit(rows(way, "gradients")) for way in ways])
        held = torch.cat([places * (PLACES / places.norm(dim=1).mean()), slopes])
        _, sizes, vectors = torch.linalg.svd(held.double(), full_matrices=False)
        sizes, vectors = sizes[:DIRECTIONS, None], vectors[:DIRECTIONS]
        vectors = vectors * sizes * math.sqrt(vectors.shape[1] / float(sizes.square().sum()))
        counts = [ways[0][f"{layer}/gradients"].shape[1] for layer in own]
        parts = vectors.half().split(counts, dim=1)
        found |= {
            layer.partition("/")[2]: part.contiguous()
            for layer, part in zip(own, parts, strict=True)
        }
    return found


def _unit(slopes: Tensor) -> Tensor:
    return slopes / slopes.norm(dim=1, keepdim=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder of ways, images and cache")
    parser.add_argument("--output", type=Path, default=resources.tiny_model() / FILE)
    options = parser.parse_args()
    CANDIDATES.update(styles())
    options.work.mkdir(parents=True, exist_ok=True)
    ways = []
    for name in tqdm(sorted(styles()), desc="styles"):
        path = options.work / f"way_{name}.safetensors"
        if not path.is_file():
            save_file(follow(name, options.data, options.work), path)
        ways.append(load_file(path))
    directions = spanned(ways)
    save_file(directions, options.output, {"made by": "python -m benchmarks.subspace"})
    print(f"wrote {options.output}: {len(directions)} layers, {DIRECTIONS} directions")


if __name__ == "__main__":
    main()
