"""The part of a plan that all runs on pictures share, be they trained on a style or on rewards."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qzo_diffusion import devices
from qzo_diffusion.config.files import with_whole_paths
from qzo_diffusion.config.style import Config
from qzo_diffusion.core.errors import ConfigError, ModelError
from qzo_diffusion.core.optimizer import Schedule
from qzo_diffusion.core.parametrization import Parametrization
from qzo_diffusion.core.probing import Probing
from qzo_diffusion.core.scales import ScaleSet
from qzo_diffusion.diffusion.families.family import Family
from qzo_diffusion.diffusion.memory import MemoryPlan
from qzo_diffusion.diffusion.pipeline_shape import PipelineShape, known_shape
from qzo_diffusion.diffusion.prompts import Prompts
from qzo_diffusion.diffusion.sampling import Sampler
from qzo_diffusion.diffusion.style_folder import StyleFolder
from qzo_diffusion.diffusion.trigger import Trigger
from qzo_diffusion.quant.gguf_entries import blocks_in_words
from qzo_diffusion.runs import build, provenance
from qzo_diffusion.runs.plan import Components
from qzo_diffusion.runs.style import batches, pipeline
from qzo_diffusion.runs.style.checks import check_sizes, check_words
from qzo_diffusion.runs.style.choose_model import choose_model, resolve_model_
from qzo_diffusion.runs.style.levels import for_samples
from qzo_diffusion.runs.style.load_prior import drawn_prior, prior_examples
from qzo_diffusion.runs.style.memory import memory_plan, resolve_rows_
from qzo_diffusion.runs.style.prior import DrawnPrior, PriorSource, find_prior
from qzo_diffusion.runs.style.prior_examples import PriorExamples
from qzo_diffusion.runs.style.samples import prompt_table
from qzo_diffusion.runs.tuned import described, set_initial_
from qzo_diffusion.system.console import report
from qzo_diffusion.train.distributed import Ranks
from qzo_diffusion.train.run_folder import RunFolder

# settings that ranks need not share: paths, and the memory of each process
LOCAL = {
    "init_from": True,
    "data": {"style_dir", "validation_dir", "cache_dir"},
    "sample": {"prompts"},
    "prior": {"prompts", "dir"},
    "reward": {"prompts", "scores", "second", "scorer"},
    "train": {"micro_batch_size"},
}
NAMED = ("init_from", "transformer", "family")  # that a journal names where they are given


@dataclass(frozen=True)
class Loaded:
    """The encoded data of a run and its model, with the scales that it begins with.

    Attributes:
        sampled: the transformer as samples call it.
        base: fingerprints of the codes, and of the scales.
        drawn: the pictures of the prior, if the base draws them.
        prior: the examples of the prior.
    """

    encoded: batches.Encoded
    transformer: nn.Module
    sampled: nn.Module
    scales: ScaleSet
    theta: Parametrization
    base: tuple[str, str]
    drawn: DrawnPrior | None
    prior: PriorExamples | None


@dataclass(frozen=True, kw_only=True)
class PicturePlan(ABC):
    """What `runs.plan.Plan` asks for, as far as the training data does not matter.

    Attributes:
        prompts: those of the samples.
        trigger: the word of the style, if captions and prompts hold one.
    """

    config: Config
    model_folder: Path
    device: torch.device
    dtype: torch.dtype
    prompts: Prompts
    shape: PipelineShape
    trigger: Trigger | None = None
    prior: PriorSource | None = None

    @abstractmethod
    def headlines(self) -> list[str]:
        """Return the lines of the summary on the data, the steps and the prompts."""

    @abstractmethod
    def kept_encoded(self) -> tuple[int, int]:
        """Return how many images and prompts the run keeps encoded."""

    @property
    def runtime(self) -> pipeline.Runtime:
        return pipeline.Runtime(self.model_folder, self.device, self.dtype, self.shape)

    @property
    def family(self) -> Family:
        return self.shape.family

    def describe(self) -> str:
        return f"{self.config.to_yaml()}\n{self.summary()}"

    def summary(self) -> str:
        config, (first, *more) = self.config, self.headlines()
        begins = [] if config.init_from is None else [f"begins    with {described(config)}"]
        lines = [first, *begins, *more, *(self.prior.summary(config) if self.prior else [])]
        if blocks := blocks_in_words(self.shape.transformer.entries):
            lines.append(f"blocks    {blocks}, of the GGUF file; quant.* is not used")
        lines.append(f"compute   {self.device}, {str(self.dtype).removeprefix('torch.')}")
        return "\n".join([*lines, self.memory().describe()])

    def memory(self) -> MemoryPlan:
        return memory_plan(self.config, self.runtime, *self.kept_encoded())

    def resolve_rows_(self) -> None:
        resolve_rows_(self.config, self.runtime, *self.kept_encoded())

    def settings(self) -> dict[str, Any]:
        return self.config.model_dump(exclude=LOCAL)  # type: ignore[arg-type]

    def metadata(self, components: Components) -> dict[str, str]:
        return provenance.scales_metadata(self.config, components.header["codes"])

    def probing(self) -> Probing:
        return build.probing(self.config)

    def schedule(self, factor: float) -> Schedule:
        return build.schedule(self.config, factor)

    def header(self, base: tuple[str, str]) -> dict[str, Any]:
        """Return the journal's header, with the places that a replay needs to find its base."""
        places = {key: getattr(self.config, key) for key in NAMED}
        return provenance.journal_header(self.config, self.config.examples, *base) | {
            key: value for key, value in places.items() if value is not None
        }

    def load_parts(self, ranks: Ranks, style: StyleFolder, texts: Prompts) -> Loaded:
        """Encode the data, free the encoders, load the transformer, and draw the prior.

        Args:
            style, texts: the images and the prompts to encode beside those of the prior.
        """
        config, runtime = self.config, self.runtime
        if not ranks.first:
            # wait until the first rank has encoded everything into the cache
            ranks.wait()
        encoded = batches.encode(
            config, self.model_folder, style, texts, self.device, self.dtype, self.prior
        )
        if ranks.first:
            ranks.wait()
        transformer, scales, theta = pipeline.load_base(config, runtime)
        sampled = for_samples(config, self.family, transformer, scales)
        set_initial_(config, transformer, scales)
        base = build.fingerprints(transformer, scales)
        drawn = drawn_prior(config, self.prior, runtime, ranks, transformer, base, encoded)
        prior = prior_examples(
            config, self.prior, self.family, transformer, self.dtype, encoded, drawn
        )
        return Loaded(encoded, transformer, sampled, scales, theta, base, drawn, prior)

    def sampler(self, loaded: Loaded) -> Sampler:
        """Return what draws the samples."""
        texts, vae = loaded.encoded.prompts, loaded.encoded.vae
        prompts = self.prompts.prompts
        return pipeline.sampler(self.config, self.runtime, loaded.sampled, vae, prompts, texts)

    def write_facts(self, out: RunFolder, loaded: Loaded, data: list[dict[str, Any]]) -> None:
        """Write tables of the data and the prompts, and the pictures of the prior."""
        out.write_json("dataset.json", data)
        out.write_json("samples/prompts.json", prompt_table(self.prompts, self.trigger))
        if loaded.drawn is not None:
            loaded.drawn.save_grid(out.path / "samples" / "prior.png")


def resolve(config: Config, folder: Path, shape: PipelineShape, device: torch.device) -> Config:
    """Return the settings with whole paths, and with all that follows from model and device."""
    resolved, family = with_whole_paths(config), shape.family
    resolved.data.resolution = config.data.resolution or shape.native_resolution
    pipeline.resolve_sampling_(resolved, family, folder)
    if resolved.quant.skip is None:
        resolved.quant.skip = list(family.denoiser.skip)
    build.resolve_dtype_(resolved, device)
    build.resolve_backend_(resolved, device)
    resolve_model_(resolved, folder)
    return resolved


def checked_prior(
    config: Config, folder: Path, shape: PipelineShape, resolution: int, style: StyleFolder
) -> PriorSource | None:
    """Find the prior of a run; its sizes and words fit the model.

    Raises:
        ConfigError: scales are trained in place, so that no base is there to be near to.
    """
    if config.prior.weight and config.qzo.parametrization == "dense":
        raise ConfigError(
            f"prior.weight={config.prior.weight:g} with qzo.parametrization=dense",
            "numbers beside the scales: those of dense are the base's own, whose prediction would "
            "be the tuned model's",
            "give qzo.parametrization=row, or leave prior.weight out",
        )
    prior = find_prior(config, folder, resolution, style)
    if prior is not None:
        check_sizes(shape, resolution, prior.folder)
        check_words(config, shape.family, folder, prior.prompts or Prompts([]), prior.folder)
    return prior


def model_of(config: Config, dry_run: bool) -> tuple[Path, PipelineShape]:
    """Return the model's folder and shape.

    A dry run may take the known shape of a published model whose weights are missing.
    """
    try:
        folder, why = choose_model(config.model)
    except ModelError:
        known = known_shape(config.model) if dry_run and config.transformer is None else None
        if known is None:
            raise
        report(f"model: {config.model}, whose weights are not here; planned from its known shape")
        return Path(config.model), known
    report(why)
    if config.compute.device == "auto" and (told := devices.unseen_gpu()):
        report(f"warning: {told}")
    return folder, pipeline.check_model(config, folder)
