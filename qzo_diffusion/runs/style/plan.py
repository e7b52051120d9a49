"""Plan the runs of `qzo-diffuse train`: a style from a folder of images.

`runs.training` executes the plan.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qzo_diffusion import devices, resources
from qzo_diffusion.config.files import with_whole_paths
from qzo_diffusion.config.style import Config
from qzo_diffusion.core.errors import ConfigError, DataError, ModelError
from qzo_diffusion.core.optimizer import Schedule
from qzo_diffusion.core.probing import Probing
from qzo_diffusion.diffusion.families.family import Family, model_loss
from qzo_diffusion.diffusion.memory import MemoryPlan
from qzo_diffusion.diffusion.pipeline_shape import PipelineShape, known_shape
from qzo_diffusion.diffusion.prompts import Prompts
from qzo_diffusion.diffusion.style_folder import (
    StyleFolder,
    dataset_table,
    read_style_folder,
    summary,
)
from qzo_diffusion.diffusion.trigger import Trigger, find_trigger
from qzo_diffusion.quant.gguf_entries import blocks_in_words
from qzo_diffusion.runs import build, provenance
from qzo_diffusion.runs.plan import Components
from qzo_diffusion.runs.provenance import journal_header
from qzo_diffusion.runs.style import batches as style_data
from qzo_diffusion.runs.style import pipeline
from qzo_diffusion.runs.style.checks import check_sizes, check_words, warn_of_distilled
from qzo_diffusion.runs.style.levels import for_samples
from qzo_diffusion.runs.style.load_prior import drawn_prior, prior_examples
from qzo_diffusion.runs.style.memory import fitting_micro_batch, memory_plan
from qzo_diffusion.runs.style.prior import PriorSource, find_prior
from qzo_diffusion.runs.style.samples import (
    Pictures,
    chosen_prompts,
    prompt_table,
    prompts_in_words,
)
from qzo_diffusion.runs.tuned import described, set_initial_
from qzo_diffusion.system.console import report
from qzo_diffusion.train.distributed import Ranks
from qzo_diffusion.train.run_folder import RunFolder
from qzo_diffusion.train.tracking import Tracker


@dataclass(frozen=True)
class StylePlan:
    """`runs.plan.Plan` of a style."""

    config: Config
    model_folder: Path
    device: torch.device
    dtype: torch.dtype
    style: StyleFolder
    prompts: Prompts
    shape: PipelineShape | None = None
    trigger: Trigger | None = None
    prior: PriorSource | None = None

    thing = "image"
    facts = ("sha256", "caption", "bucket", "split", "repeats")

    @property
    def has_journal(self) -> bool:
        return self.config.method != "fo-scales"

    @property
    def sample_prompts(self) -> list[str]:
        return self.prompts.texts

    @property
    def runtime(self) -> pipeline.Runtime:
        return pipeline.Runtime(self.model_folder, self.device, self.dtype, self.shape)

    @property
    def family(self) -> Family:
        if self.shape is not None:
            return self.shape.family
        return pipeline.family_of(self.config, self.model_folder)

    @property
    def name(self) -> str:
        return Path(self.config.data.style_dir or "").name

    def describe(self) -> str:
        return f"{self.config.to_yaml()}\n{self.summary()}"

    def summary(self) -> str:
        lines = [
            summary(self.style),
            f"prompts   {prompts_in_words(self.sample_prompts, self.trigger)}",
            *(f"note      {note}" for note in self.prompts.notes),
            *(self.prior.summary(self.config) if self.prior else []),
            f"compute   {self.device}, {str(self.dtype).removeprefix('torch.')}",
            self.memory().describe(),
        ]
        if self.shape and (blocks := blocks_in_words(self.shape.transformer.entries)):
            lines.insert(-2, f"blocks    {blocks}, of the GGUF file; quant.* is not used")
        if self.has_journal:
            images, of_prior = self.config.data.batch_size, self.config.prior_examples
            step = build.step_in_words(self.config, images, "images", of_prior)
            lines.insert(2, f"a step    {step}")
        if self.config.init_from is not None:
            lines.insert(1, f"begins    with {described(self.config)}")
        return "\n".join(lines)

    def memory(self) -> MemoryPlan:
        return memory_plan(self.config, *self._needs())

    def rows_that_fit(self) -> int:
        return fitting_micro_batch(self.config, *self._needs())

    def _needs(self) -> tuple[pipeline.Runtime, int, int]:
        """Return the runtime, and how many images and prompts the run keeps encoded."""
        captions = {sample.caption for sample in self.pictures.samples}
        prompts = self.prompts.texts + self.prompts.negatives
        return self.runtime, len(self.pictures.samples), len(captions) + len(prompts)

    @property
    def pictures(self) -> StyleFolder:
        """Return the images of the style and the pictures of the prior."""
        of_prior = self.prior.samples if self.prior else []
        return replace(self.style, samples=[*self.style.samples, *of_prior])

    def data(self) -> list[dict[str, Any]]:
        return dataset_table(self.pictures)

    def settings(self) -> dict[str, Any]:
        # paths, and the memory of each process
        local = {
            "data": {"style_dir", "validation_dir", "cache_dir"},
            "sample": {"prompts"},
            "prior": {"prompts", "dir"},
            "train": {"micro_batch_size"},
        }
        return self.config.model_dump(exclude=local | {"init_from": True})

    def metadata(self, components: Components) -> dict[str, str]:
        return provenance.scales_metadata(self.config, components.header["codes"])

    def probing(self) -> Probing:
        return build.probing(self.config)

    def schedule(self, factor: float) -> Schedule:
        return build.schedule(self.config, factor)

    def load(self, ranks: Ranks) -> Components:
        """Encode the data, free the encoders, load and quantize the transformer."""
        config, device, dtype, family = self.config, self.device, self.dtype, self.family
        if ranks.world > 1 and not self.has_journal:
            raise ConfigError(
                f"method {config.method} on {ranks.world} processes",
                "one process",
                "start it without torchrun",
            )
        if not ranks.first:
            # wait until the first rank has encoded everything into the cache
            ranks.wait()
        encoded = style_data.encode(
            config, self.model_folder, self.style, self.prompts, device, dtype, self.prior
        )
        if ranks.first:
            ranks.wait()
        transformer, scales, theta = pipeline.load_base(config, self.runtime)
        sampled = for_samples(config, family, transformer, scales)
        set_initial_(config, transformer, scales)
        base = build.fingerprints(transformer, scales)
        drawn = drawn_prior(config, self.prior, self.runtime, ranks, transformer, base, encoded)
        optimizer, take_step = (
            (build.optimizer(config), None)
            if self.has_journal
            else build.first_order(config, transformer)
        )

        def pictures(out: RunFolder, tracker: Tracker) -> Pictures:
            counts = style_data.token_counts(self.pictures, encoded.prompts)
            out.write_json("dataset.json", dataset_table(self.pictures, counts))
            out.write_json("samples/prompts.json", prompt_table(self.prompts, self.trigger))
            _warn_of_truncation(counts)
            if drawn is not None:
                drawn.save_grid(out.path / "samples" / "prior.png")
            vae, prompts = encoded.vae, self.prompts.prompts
            sampler = pipeline.sampler(config, self.runtime, sampled, vae, prompts, encoded.prompts)
            held_out = style_data.validation_batches(
                self.style.validation, encoded, device, config.data.batch_size, config.train.seed
            )
            return Pictures(out.path / "samples", sampler, tracker, held_out, config.sample.every)

        return Components(
            scales=scales,
            theta=theta,
            optimizer=optimizer,
            objective=lambda batch: model_loss(family, transformer, batch, dtype),
            batches=style_data.TrainingBatches(
                config,
                self.style.train,
                encoded,
                device,
                ranks,
                prior_examples(config, self.prior, family, transformer, dtype, encoded, drawn),
            ),
            header=header_of(config, base),
            callbacks=pictures,
            take_step=take_step,
        )


def make_plan(config: Config, dry_run: bool = False) -> StylePlan:
    """Resolve the model, the device and the data, and check all of them.

    Args:
        dry_run: the plan is only shown, so a published model may be planned by its known shape.
    """
    if config.data.style_dir is None:
        raise ConfigError(
            "no style folder and no reward",
            "a folder of images, or a score of pictures",
            "pass --style-dir DIR, or --reward NAME with --prompts FILE",
        )
    folder, shape = model_of(config, dry_run)
    device = devices.choose_device(config.compute.device)
    resolution = config.data.resolution or shape.native_resolution
    images = resources.find_file(config.data.style_dir, "demo_images")
    held_out = (
        resources.find_file(config.data.validation_dir, "demo_images")
        if config.data.validation_dir
        else None
    )
    style = read_style_folder(
        images,
        resolution=resolution,
        caption=config.data.caption,
        trigger=config.data.trigger,
        repeats=config.data.repeats,
        strict=config.data.strict,
        validation_dir=held_out,
        seed=config.train.seed,
        masks=config.data.masks,
    )
    if not style.train:
        raise DataError(
            "no image to train on",
            "at least one",
            "give more images or a separate --validation-dir",
        )
    default = pipeline.shipped_prompts(folder, "grid")
    trigger = find_trigger([sample.caption for sample in style.samples], config.data.trigger)
    prompts = chosen_prompts(config.sample.prompts or default, config.data.trigger, trigger)
    warn_of_distilled(shape, config.model)
    check_sizes(shape, resolution, style)
    check_words(config, shape.family, folder, prompts, style)
    prior = checked_prior(config, folder, shape, resolution, style)
    pipeline.tensor_cache(config).check()
    resolved = with_whole_paths(config)
    resolved.data.resolution = resolution
    pipeline.resolve_sampling_(resolved, shape.family, folder)
    if resolved.quant.skip is None:
        resolved.quant.skip = list(shape.family.denoiser.skip)
    resolved.data.style_dir = str(images.resolve())
    resolved.data.validation_dir = str(held_out.resolve()) if held_out else None
    resolved.compute.dtype = devices.dtype_name(devices.choose_dtype(config.compute.dtype, device))
    build.resolve_backend_(resolved, device)
    pipeline.resolve_model_(resolved, folder)
    plan = StylePlan(
        resolved,
        folder,
        device,
        devices.choose_dtype(config.compute.dtype, device),
        style,
        prompts,
        shape,
        trigger,
        prior,
    )
    if resolved.train.micro_batch_size is None:
        resolved.train.micro_batch_size = plan.rows_that_fit()
    return plan


def checked_prior(
    config: Config, folder: Path, shape: PipelineShape, resolution: int, style: StyleFolder
) -> PriorSource | None:
    """Find the prior of a run; its sizes and words fit the model."""
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
        folder, why = pipeline.choose_model(config.model)
    except ModelError:
        known = known_shape(config.model) if dry_run and config.transformer is None else None
        if known is None:
            raise
        report(f"model: {config.model}, whose weights are not here; planned from its known shape")
        return Path(config.model), known
    report(why)
    return folder, pipeline.check_model(config, folder)


def header_of(config: Config, base: tuple[str, str]) -> dict[str, Any]:
    """Return the journal's header, with the paths that a replay needs to find its base.

    base: fingerprints of the codes, and of the scales that the run begins with.
    """
    places = {key: getattr(config, key) for key in ("init_from", "transformer", "family")}
    return journal_header(config, config.examples, *base) | {
        key: value for key, value in places.items() if value is not None
    }


def _warn_of_truncation(counts: dict[str, tuple[int, bool]]) -> None:
    cut = [name for name, (_, truncated) in counts.items() if truncated]
    if cut:
        report(
            f"warning: {len(cut)} of {len(counts)} captions are longer than the text encoders "
            f"read, for example {cut[0]}"
        )
