"""Find the pictures of the prior: those of a folder, or those that the base draws of prompts.

`prior.weight` holds the model to its own predictions on them, as regularisation images do in
trainers of DreamBooth (arXiv 2208.12242).
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from qzo_diffusion import resources
from qzo_diffusion.config.style import Config
from qzo_diffusion.core.errors import DataError, ModelError, OutputError
from qzo_diffusion.diffusion.cache import TensorCache
from qzo_diffusion.diffusion.encoded_prompt import EncodedPrompt
from qzo_diffusion.diffusion.model_folder import fingerprint_of_files
from qzo_diffusion.diffusion.prompts import Prompt, Prompts, read_prompt_file
from qzo_diffusion.diffusion.sample import Sample
from qzo_diffusion.diffusion.sampling import Sampler, grid, save_picture
from qzo_diffusion.diffusion.style_folder import StyleFolder, read_style_folder
from qzo_diffusion.quant.base import fingerprint
from qzo_diffusion.runs.style import pipeline
from qzo_diffusion.runs.style.choose_model import shipped_prompts
from qzo_diffusion.system.console import report
from qzo_diffusion.system.progress import Progress

VERSION = 1  # raise it whenever the same settings draw other pictures


@dataclass(frozen=True)
class PriorSource:
    """The pictures of the prior before they are drawn or encoded.

    samples: one for each picture. prompts: what the base draws; None for a folder's pictures.
    notes: remarks for the user.
    """

    samples: list[Sample]
    prompts: Prompts | None
    notes: list[str]

    @property
    def files(self) -> list[Sample]:
        """Return the pictures that exist."""
        return self.samples if self.prompts is None else []

    @property
    def texts(self) -> list[str]:
        """Return all texts to encode."""
        captions = [sample.caption for sample in self.samples]
        return captions + (self.prompts.negatives if self.prompts else [])

    @property
    def folder(self) -> StyleFolder:
        """Return the pictures as a folder, for checks and tables."""
        return StyleFolder(self.samples, [], [])

    def summary(self, config: Config) -> list[str]:
        origin = "of a folder" if self.prompts is None else "that the base draws"
        line = f"prior     {len(self.samples)} pictures {origin}, weight {config.prior.weight:g}"
        return [line, *(f"note      prior: {note}" for note in self.notes)]


def find_prior(
    config: Config, model_folder: Path, resolution: int, style: StyleFolder
) -> PriorSource | None:
    """Find the prior of a run; None without `prior.weight`.

    Raises:
        DataError: no such folder or file, or nothing usable in it.
    """
    if not config.prior.weight:
        return None
    if config.prior.dir is not None:
        return _of_folder(Path(config.prior.dir), config, resolution, style)
    default = shipped_prompts(model_folder, "grid")
    file = resources.find_file(config.prior.prompts or default, "prompts")
    prompts = read_prompt_file(file, config.data.trigger)
    samples = [_to_draw(at, prompt, resolution) for at, prompt in enumerate(prompts.prompts)]
    return PriorSource(samples, prompts, prompts.notes)


def _of_folder(folder: Path, config: Config, resolution: int, style: StyleFolder) -> PriorSource:
    try:
        found = read_style_folder(
            folder, resolution=resolution, trigger=config.data.trigger, strict=config.data.strict
        )
    except DataError as error:
        raise DataError(
            f"prior.dir: {error.got}",
            error.expected,
            "give prior.dir a folder of captioned pictures, or leave it out: the base then draws "
            "pictures of prior.prompts",
        ) from None
    samples = [
        replace(sample, id=f"prior:{sample.id}", split="prior", repeats=1)
        for sample in sorted(found.samples, key=lambda sample: sample.id)
    ]
    notes = [f"{len(found.bad)} unusable pictures"] if found.bad else []
    trained = {sample.sha256 for sample in style.samples}
    if shared := sum(sample.sha256 in trained for sample in samples):
        notes.append(f"{shared} of its pictures are images of the style as well")
    return PriorSource(samples, None, notes)


def _to_draw(at: int, prompt: Prompt, side: int) -> Sample:
    """Return a picture that does not exist yet; its hash is that of its line."""
    line = f"{prompt.text}\0{prompt.negative or ''}"
    return Sample(
        id=f"prior:{at:03d}",
        path=Path(),
        sha256=hashlib.sha256(line.encode()).hexdigest(),
        caption=prompt.text,
        caption_source="prior.prompts",
        caption_place=prompt.place,
        width=side,
        height=side,
        notes=(),
        split="prior",
        repeats=1,
    )


def seeded(config: Config) -> Config:
    """Return the settings for drawing: picture i is drawn from `train.seed` + i."""
    sample = config.sample.model_copy(update={"seed": config.train.seed})
    return config.model_copy(update={"sample": sample})


def drawing_key(
    config: Config,
    source: PriorSource,
    runtime: pipeline.Runtime,
    base: tuple[str, str],
    encoded: Mapping[str, EncodedPrompt],
) -> dict[str, str | int | float | bool]:
    """Return everything that the drawn pictures depend on, for the cache.

    Args:
        base: fingerprints of the codes, and of the scales that the run begins with.
        encoded: all texts of `source`, and the negative prompt.
    """
    assert source.prompts is not None
    sample, prompts = config.sample, source.prompts.prompts
    texts = [prompt.text for prompt in prompts]
    texts += [
        sample.negative_prompt if prompt.negative is None else prompt.negative for prompt in prompts
    ]
    return {
        "kind": "prior",
        "version": VERSION,
        "codes": base[0],
        "scales": base[1],
        "texts": fingerprint((f"{at:06d}", encoded[text].embeds) for at, text in enumerate(texts)),
        "scheduler": fingerprint_of_files(runtime.folder, ("scheduler",)),
        "activations": config.quant.activations,
        "dtype": str(runtime.dtype),
        "side": source.samples[0].width,
        "steps": sample.steps or 1,
        "guidance": sample.guidance or 0.0,
        "seed": config.train.seed,
        "batch_size": sample.batch_size or pipeline.MOST_DRAWN,
    }


class DrawnPrior:
    """Pictures that the base draws. They are kept in the cache of encoded pictures, each batch of
    `sample.batch_size` as a whole, so that a run which was stopped goes on with the same ones.

    Args:
        sampler: of the prior's prompts, with the scales that the run begins with.
        key: `drawing_key`.

    Attributes:
        latents: [C, h, w] fp32 on the CPU, by the pictures' ids.

    Raises:
        ModelError: the base draws NaN.
        OutputError: the cache can't be written.
    """

    def __init__(
        self,
        source: PriorSource,
        sampler: Sampler,
        cache: TensorCache,
        key: dict[str, str | int | float | bool],
    ) -> None:
        self._sampler, self._cache, self._key = sampler, cache, key
        starts = Progress(sampler.starts, desc="draw the prior", unit="batch", leave=False)
        drawn = [latents for start in starts for latents in self._batch(start)]
        self.latents = {one.id: own for one, own in zip(source.samples, drawn, strict=True)}

    def _batch(self, start: int) -> Tensor:
        key = {**self._key, "start": start}
        stored = self._cache.get(key)
        if stored is None:
            stored = {"latents": self._sampler.latents(start).float().cpu()}
            _check_finite(stored["latents"])
            self._cache.put(key, stored)
        return stored["latents"]

    def save_grid(self, path: Path) -> None:
        """Write the pictures, so that a person can look at them; a failure only warns."""
        if path.exists():
            return
        device = self._sampler.device
        try:
            images = [self._sampler.decode(one.to(device)) for one in self.latents.values()]
            save_picture(grid([images], ["prior"]), path)
        except (RuntimeError, OSError, ValueError, OutputError) as error:
            report(f"warning: no picture of the prior: {error}")


def _check_finite(latents: Tensor) -> None:
    if not torch.isfinite(latents).all():
        raise ModelError(
            "NaN or infinite pictures of the prior",
            "a base that draws finite numbers",
            "choose compute.dtype=float32 or bfloat16",
        )


def latents_of_files(
    files: Sequence[Sample], latents: Mapping[tuple[str, bool], Tensor]
) -> dict[str, Tensor]:
    """Return the latents of existing pictures by id, none mirrored."""
    return {sample.id: latents[sample.id, False] for sample in files}
