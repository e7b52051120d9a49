"""Plan the runs of `qzo-diffuse train`: a style from a folder of images.

`runs.training` executes the plan.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qzo_diffusion import devices, resources
from qzo_diffusion.config.style import Config
from qzo_diffusion.core.errors import ConfigError, DataError
from qzo_diffusion.diffusion.families.family import model_loss
from qzo_diffusion.diffusion.style_folder import (
    StyleFolder,
    dataset_table,
    read_style_folder,
    summary,
)
from qzo_diffusion.diffusion.trigger import find_trigger
from qzo_diffusion.runs import build
from qzo_diffusion.runs.plan import Components
from qzo_diffusion.runs.style import batches as style_data
from qzo_diffusion.runs.style import pipeline
from qzo_diffusion.runs.style.checks import check_sizes, check_words, warn_of_distilled
from qzo_diffusion.runs.style.choose_model import shipped_prompts
from qzo_diffusion.runs.style.picture_plan import PicturePlan, checked_prior, model_of, resolve
from qzo_diffusion.runs.style.samples import Pictures, chosen_prompts, prompts_in_words
from qzo_diffusion.runs.subspace import check_subspace
from qzo_diffusion.system.console import report
from qzo_diffusion.train.distributed import Ranks
from qzo_diffusion.train.run_folder import RunFolder
from qzo_diffusion.train.tracking import Tracker


@dataclass(frozen=True, kw_only=True)
class StylePlan(PicturePlan):
    """`runs.plan.Plan` of a style."""

    style: StyleFolder

    thing = "image"
    facts = ("sha256", "caption", "bucket", "split", "repeats")

    @property
    def has_journal(self) -> bool:
        return self.config.method != "fo-scales"

    @property
    def sample_prompts(self) -> list[str]:
        return self.prompts.texts

    @property
    def name(self) -> str:
        return Path(self.config.data.style_dir or "").name

    def headlines(self) -> list[str]:
        lines = [
            summary(self.style),
            f"prompts   {prompts_in_words(self.sample_prompts, self.trigger)}",
        ]
        if self.has_journal:
            images, of_prior = self.config.data.batch_size, self.config.prior_examples
            step = build.step_in_words(self.config, images, "images", of_prior)
            lines.append(f"a step    {step}")
        return lines + [f"note      {note}" for note in self.prompts.notes]

    def kept_encoded(self) -> tuple[int, int]:
        captions = {sample.caption for sample in self.pictures.samples}
        prompts = self.prompts.texts + self.prompts.negatives
        return len(self.pictures.samples), len(captions) + len(prompts)

    @property
    def pictures(self) -> StyleFolder:
        """Return the images of the style and the pictures of the prior."""
        of_prior = self.prior.samples if self.prior else []
        return replace(self.style, samples=[*self.style.samples, *of_prior])

    def data(self) -> list[dict[str, Any]]:
        return dataset_table(self.pictures)

    def load(self, ranks: Ranks) -> Components:
        """Load the model and the data.

        Raises:
            ConfigError: a method without a journal, on several processes.
        """
        config, device, dtype, family = self.config, self.device, self.dtype, self.family
        if ranks.world > 1 and not self.has_journal:
            raise ConfigError(
                f"method {config.method} on {ranks.world} processes",
                "one process",
                "start it without torchrun",
            )
        loaded = self.load_parts(ranks, self.style, self.prompts)
        encoded, transformer = loaded.encoded, loaded.transformer
        optimizer, take_step = (
            (build.optimizer(config), None)
            if self.has_journal
            else build.first_order(config, transformer)
        )

        def pictures(out: RunFolder, tracker: Tracker) -> Pictures:
            counts = style_data.token_counts(self.pictures, encoded.prompts)
            self.write_facts(out, loaded, dataset_table(self.pictures, counts))
            _warn_of_truncation(counts)
            held_out = style_data.validation_batches(
                self.style.validation,
                encoded,
                device,
                build.validated_at_once(config),
                config.train.seed,
            )
            sampler = self.sampler(loaded)
            return Pictures(out.path / "samples", sampler, tracker, held_out, config.sample.every)

        return Components(
            scales=loaded.scales,
            theta=loaded.theta,
            optimizer=optimizer,
            objective=lambda batch: model_loss(family, transformer, batch, dtype),
            batches=style_data.TrainingBatches(
                config, self.style.train, encoded, device, ranks, loaded.prior
            ),
            header=self.header(loaded.base),
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
    check_subspace(config.qzo.subspace)  # before a folder is made, by its header
    if config.qzo.subspace is not None:
        report(f"directions: sums of those in {config.qzo.subspace}")
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
    default = shipped_prompts(folder, "grid")
    trigger = find_trigger([sample.caption for sample in style.samples], config.data.trigger)
    prompts = chosen_prompts(config.sample.prompts or default, config.data.trigger, trigger)
    warn_of_distilled(shape, config)
    check_sizes(shape, resolution, style)
    check_words(config, shape.family, folder, prompts, style)
    prior = checked_prior(config, folder, shape, resolution, style)
    pipeline.tensor_cache(config).check()
    resolved = resolve(config, folder, shape, device)
    resolved.data.style_dir = str(images.resolve())
    resolved.data.validation_dir = str(held_out.resolve()) if held_out else None
    plan = StylePlan(
        config=resolved,
        model_folder=folder,
        device=device,
        dtype=devices.choose_dtype(resolved.compute.dtype, device),
        prompts=prompts,
        shape=shape,
        trigger=trigger,
        prior=prior,
        style=style,
    )
    plan.resolve_rows_()
    return plan


def _warn_of_truncation(counts: dict[str, tuple[int, bool]]) -> None:
    cut = [name for name, (_, truncated) in counts.items() if truncated]
    if cut:
        report(
            f"warning: {len(cut)} of {len(counts)} captions are longer than the text encoders "
            f"read, for example {cut[0]}"
        )
