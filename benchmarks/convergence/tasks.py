"""What is trained and how it is measured: the seam between the benchmark and a kind of model.

A `Task` hands out an objective, batches, the held-out loss and the quantized scales; methods, cells
and report know nothing else. Styles are here, SST-2 on a language model in `text_task`.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.convergence.settings import UNSEEN
from benchmarks.convergence.text_task import TextTask
from benchmarks.tiny.drawings import Drawings, caption_of, load_drawings, taught_concepts
from qzo_diffusion.config.files import make_config
from qzo_diffusion.core.noise import torch_generator
from qzo_diffusion.core.oracle import DifferentiableHandle
from qzo_diffusion.core.probing import StepBatch
from qzo_diffusion.core.scales import ScaleSet
from qzo_diffusion.diffusion.families.family import model_loss
from qzo_diffusion.diffusion.flow_matching import Batch, SigmaDistribution
from qzo_diffusion.diffusion.images import open_image
from qzo_diffusion.diffusion.listing import METADATA_NAME
from qzo_diffusion.diffusion.prompts import Prompt, Prompts
from qzo_diffusion.diffusion.sample import Sample
from qzo_diffusion.diffusion.sampling import Sampler
from qzo_diffusion.quant.load import handles_of
from qzo_diffusion.runs import build
from qzo_diffusion.runs.style import batches as style_data
from qzo_diffusion.runs.style import pipeline
from qzo_diffusion.runs.style.plan import make_plan
from qzo_diffusion.system.files import write_whole
from qzo_diffusion.train.distributed import Ranks

STYLE_WORDS = {
    "fluent_mono": "mono style",
    "openmoji": "openmoji style",
    "fluent3d": "3d style",
    "twemoji": "twemoji style",
}
NF4_64 = {"type": "nf4", "blocksize": 64, "backend": "bnb"}
UNLIKE = {"type": "fp4", "blocksize": 128, "backend": "reference"}
STYLE_TASKS = {style: (style, NF4_64) for style in ("fluent_mono", "openmoji", "fluent3d")} | {
    UNSEEN: ("twemoji", UNLIKE)
}
TRAIN, HELD_OUT = 64, 128
EVALUATION_SEED = 0  # the same for every seed of a run


class Task(Protocol):
    """One set of data with its model.

    model: what holds the quantized layers. scales: the live ones, as the base model has them before
    a run. held_out: micro-batches of the held-out loss, always the same.
    pointwise: names of the layers whose numbers every region of an example can probe for itself.
    """

    model: nn.Module
    scales: ScaleSet
    held_out: Sequence[Any]
    token_wise: Sequence[str]

    def objective(self, micro_batch: Any) -> Tensor:
        """One loss per example, [B]."""
        ...

    def batches(
        self, seed: int, batch: int, regions: int, sigma: SigmaDistribution
    ) -> Callable[[int], StepBatch[Any]]:
        """The batch of any step, from (seed, step) alone; `regions` and `sigma` as in the config,
        where the task knows them.
        """
        ...

    def handles(self) -> Iterable[DifferentiableHandle]:
        """Of all quantized layers, for the exact gradient."""
        ...


def open_task(name: str, data: Path, cache: Path) -> Task:
    """Load the model, and encode the data once into `cache`.

    Args:
        name: one of `settings.DATA`, or `settings.UNSEEN`.
        data: the folder of `emoji64.npz` and `meta.json`; for sst2 that of `train.tsv` and
            `dev.tsv`.
    """
    if name == "sst2":
        return TextTask(data)
    if name not in STYLE_TASKS:
        raise ValueError(f"no task {name!r}; there are {', '.join(STYLE_TASKS)} and sst2")
    return open_style(name, data, cache)


def open_style(
    name: str, data: Path, cache: Path, train: int = TRAIN, held_out: int = HELD_OUT
) -> "StyleTask":
    """Drawings of a style that `tiny` was not taught."""
    style, quant = STYLE_TASKS[name]
    folders = [
        write_images(cache / "images" / style, part)
        for part in choose(style, data, train, held_out)
    ]
    return StyleTask(folders[0], folders[1], cache, quant)


def choose(
    style: str,
    data: Path,
    train: int = TRAIN,
    held_out: int = HELD_OUT,
    seed: int = 0,
    concepts: Sequence[str] | None = None,
) -> tuple[Drawings, Drawings]:
    """Drawings to train on and to hold out: taught concepts in a fixed random order, no picture
    twice.

    The order of the concepts is that of their names, so neither the archive's order nor a style
    changes who is held out.

    Args:
        concepts: None takes those that the embedded model was taught.

    Raises:
        ValueError: too few drawings.
    """
    taught = sorted(taught_concepts() if concepts is None else concepts)
    known = load_drawings(data, {style: STYLE_WORDS[style]}, taught)
    place = {name: index for index, name in enumerate(known.names)}
    names = sorted(place)
    seen: set[bytes] = set()
    chosen: list[str] = []
    for index in np.random.Generator(np.random.Philox(seed)).permutation(len(names)):
        picture = hashlib.sha256(known.images[place[names[index]]].numpy().tobytes()).digest()
        if picture not in seen:
            seen.add(picture)
            chosen.append(names[index])
    if len(chosen) < train + held_out:
        raise ValueError(
            f"{len(chosen)} different drawings of {style} in {data}, {train + held_out} are needed"
        )

    def part(wanted: list[str]) -> Drawings:
        images = torch.stack([known.images[place[name]] for name in wanted])
        return Drawings(images, [caption_of(name, STYLE_WORDS[style]) for name in wanted], wanted)

    return part(sorted(chosen[:train])), part(sorted(chosen[train : train + held_out]))


def write_images(folder: Path, drawings: Drawings) -> Path:
    """PNG files and metadata.jsonl, as a user's style folder has them, below `folder` in one named
    by the content.
    """
    content = repr(
        (drawings.captions, hashlib.sha256(drawings.images.numpy().tobytes()).hexdigest())
    )
    folder = folder / hashlib.sha256(content.encode()).hexdigest()[:12]
    if (folder / METADATA_NAME).exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for image, name, caption in zip(
        drawings.images, drawings.names, drawings.captions, strict=True
    ):
        file = "".join(letter if letter.isalnum() else "_" for letter in name.lower()) + ".png"
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / file)
        lines.append(json.dumps({"file_name": file, "text": caption}) + "\n")
    # last, so that a folder with it is whole
    write_whole(folder / METADATA_NAME, "".join(lines).encode())
    return folder


def stratified_sigmas(count: int, *key: int | str) -> Tensor:
    """[count]: the middles of `count` equal slices of (0, 1) in a random order, so that their mean
    loss is that of all levels.
    """
    middles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return middles[torch.randperm(count, generator=torch_generator(*key, "sigma"))].float()


class StyleTask:
    """The embedded model in 4 bits and folders of captioned images, on the CPU in fp32.

    Args:
        held_out: None holds out some of `train`, as a run does.
    """

    def __init__(
        self, train: Path, held_out: Path | None, cache: Path, quant: dict[str, Any] = NF4_64
    ) -> None:
        self._cache, self._train, self._validation, self._quant = cache, train, held_out, quant
        plan = make_plan(make_config(self._settings(0, 16) | {"sample": {"guidance": 1.0}}))
        self._plan = plan
        self._encoded = style_data.encode(
            plan.config, plan.model_folder, plan.style, Prompts([]), plan.device, plan.dtype
        )
        self.model = pipeline.quantized_transformer(
            plan.config, plan.model_folder, plan.device, plan.dtype
        )
        self.scales, _ = build.scales_and_theta(plan.config, self.model)
        self.held_out: Sequence[Batch] = self._held_out(plan.style.validation)
        self.token_wise = plan.family.denoiser.own_patch(self.scales)

    def _settings(self, seed: int, batch: int) -> dict[str, Any]:
        folders = {
            "style_dir": str(self._train),
            "validation_dir": str(self._validation) if self._validation else None,
        }
        return {
            "model": "tiny",
            "data": folders | {"batch_size": batch, "cache_dir": str(self._cache / "tensors")},
            "train": {"seed": seed},
            "quant": self._quant,
            "compute": {"dtype": "float32", "device": "cpu"},
        }

    def objective(self, micro_batch: Batch) -> Tensor:
        return model_loss(self._plan.family, self.model, micro_batch, self._plan.dtype)

    def batches(
        self, seed: int, batch: int, regions: int, sigma: SigmaDistribution
    ) -> Callable[[int], StepBatch[Batch]]:
        settings = {
            "sigma": {"distribution": sigma},
            "qzo": {"parametrization": "row", "per_example": True, "regions": regions},
        }
        config = make_config(self._settings(seed, batch) | settings)
        return style_data.TrainingBatches(
            config, self._plan.style.train, self._encoded, self._plan.device, Ranks()
        )

    def handles(self) -> Iterable[DifferentiableHandle]:
        return handles_of(self.model)

    def sampler(self, captions: Sequence[str]) -> Sampler:
        plan, vae = self._plan, self._encoded.vae
        return pipeline.sampler(
            plan.config,
            plan.runtime,
            self.model,
            vae,
            [Prompt(caption) for caption in captions],
            self._encoded.prompts,
        )

    def shown(self, count: int) -> tuple[list[str], list[Image.Image]]:
        """Captions of held-out drawings, evenly from their list, and the drawings."""
        samples = self._plan.style.validation
        chosen = [samples[index * len(samples) // count] for index in range(count)]
        return [sample.caption for sample in chosen], [
            open_image(sample.path).image for sample in chosen
        ]

    def _held_out(self, samples: Sequence[Sample], size: int = 32) -> list[Batch]:
        """Every held-out image once, at one noise level of its own: 128 passes an evaluation
        instead of 512.
        """
        latents = torch.stack(
            [self._encoded.latents.latents(sample.id, False) for sample in samples]
        )
        noise = [
            torch.randn(
                latents.shape[1:],
                generator=torch_generator(EVALUATION_SEED, "held out", sample.caption),
            )
            for sample in samples
        ]
        sigmas = stratified_sigmas(len(samples), EVALUATION_SEED)
        captions = [sample.caption for sample in samples]
        whole = style_data.make_batch(
            self._encoded, captions, latents, torch.stack(noise), sigmas, self._plan.device
        )
        return whole.split(size)
