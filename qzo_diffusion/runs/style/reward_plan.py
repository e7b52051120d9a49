"""Plan the runs of `qzo-diffuse train --reward`: pictures of prompts, tuned by their scores.

`runs.training` executes the plan. The pictures of a step are drawn and scored by
`rewards.objective`.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qzo_diffusion import devices, resources
from qzo_diffusion.config.reward import RewardName
from qzo_diffusion.config.style import Config
from qzo_diffusion.core.errors import ConfigError
from qzo_diffusion.core.probes import Objective
from qzo_diffusion.diffusion.autoencoders import reduction
from qzo_diffusion.diffusion.families.family import Family, model_loss
from qzo_diffusion.diffusion.flow_matching import Batch
from qzo_diffusion.diffusion.model_folder import load_scheduler
from qzo_diffusion.diffusion.prompts import Prompts, read_prompt_file
from qzo_diffusion.diffusion.style_folder import StyleFolder, dataset_table
from qzo_diffusion.rewards.drawing import Drawer
from qzo_diffusion.rewards.objective import RewardObjective
from qzo_diffusion.rewards.pictures import PictureBatch
from qzo_diffusion.rewards.reward import Reward
from qzo_diffusion.runs import build
from qzo_diffusion.runs.plan import Components
from qzo_diffusion.runs.style import pipeline
from qzo_diffusion.runs.style.checks import check_sizes, check_words
from qzo_diffusion.runs.style.choose_model import default_scorer, shipped_prompts
from qzo_diffusion.runs.style.picture_plan import PicturePlan, checked_prior, model_of, resolve
from qzo_diffusion.runs.style.reward_batches import RewardBatches
from qzo_diffusion.runs.style.rewarded_pictures import RewardedPictures
from qzo_diffusion.runs.style.rewards import Workshop, second_name
from qzo_diffusion.train.distributed import Ranks
from qzo_diffusion.train.run_folder import RunFolder
from qzo_diffusion.train.tracking import Tracker

NO_STYLE = StyleFolder([], [], [])
DRAWS_NOISE = ("EulerAncestral", "DDPM", "LCM")  # the beginnings of schedulers' names
FEW_STEPS = 8  # sampling steps of a picture that is scored, where nobody chose them


@dataclass(frozen=True, kw_only=True)
class RewardPlan(PicturePlan):
    """`runs.plan.Plan` of a run on rewards.

    trained: prompts whose pictures are scored in training. notes: remarks for the user.
    """

    trained: Prompts
    notes: list[str] = field(default_factory=list)

    thing = "prompt"
    facts = ("sha256", "split")
    has_journal = True

    @property
    def name(self) -> str:
        return "-".join(one.name for one in self.config.reward.names)

    @property
    def workshop(self) -> Workshop:
        return workshop(self.config, self.model_folder, self.device)

    def headlines(self) -> list[str]:
        config, reward = self.config, self.config.reward
        second = second_name(config)
        notes = [*self.trained.notes, *self.prompts.notes, *self.notes]
        prompts, of_prior = config.data.batch_size, config.prior_examples
        return [
            f"rewards   {', '.join(one.text for one in reward.names)}; "
            f"reported only: {second.text if second else 'none'}",
            f"prompts   {len(self.trained.texts)} to train on, {len(self.prompts.texts)} to sample",
            f"a step    {build.step_in_words(config, prompts, 'prompts', of_prior)}",
            f"a picture {reward.steps} sampling steps, guidance {reward.guidance:g}",
            *(f"note      {note}" for note in notes),
        ]

    def kept_encoded(self) -> tuple[int, int]:
        of_prior = len(self.prior.samples) if self.prior else 0
        return of_prior, len(set(self._texts().texts)) + of_prior

    def _texts(self) -> Prompts:
        return Prompts([*self.trained.prompts, *self.prompts.prompts])

    def data(self) -> list[dict[str, Any]]:
        rows = [_row(at, one.row) for at, one in enumerate(self.trained.prompts)]
        of_prior = dataset_table(self.prior.folder) if self.prior else []
        return rows + [{key: row[key] for key in rows[0]} for row in of_prior]

    def load(self, ranks: Ranks) -> Components:
        """Load the model and the data, then the scorers."""
        config, family = self.config, self.family
        loaded = self.load_parts(ranks, NO_STYLE, self._texts())
        encoded, transformer = loaded.encoded, loaded.transformer
        rewards = self.workshop.build(with_second=ranks.first)

        def pictures(out: RunFolder, tracker: Tracker) -> RewardedPictures:
            self.write_facts(out, loaded, self.data())
            return RewardedPictures(
                out.path / "samples",
                self.sampler(loaded),
                tracker,
                [],
                config.sample.every,
                rewards=rewards,
                prompts=self.prompts.texts,
            )

        draw = drawer(config, self.runtime, family, transformer, encoded.vae)
        return Components(
            scales=loaded.scales,
            theta=loaded.theta,
            optimizer=build.optimizer(config),
            objective=self.objective_of(draw, rewards.trained, family, transformer),
            batches=RewardBatches(
                config,
                self.trained.prompts,
                encoded.prompts,
                self._latents(),
                self.device,
                ranks,
                loaded.prior,
            ),
            header=self.header(loaded.base),
            callbacks=pictures,
        )

    def objective_of(
        self, draw: Drawer, score: Reward, family: Family, transformer: nn.Module
    ) -> Objective[Any]:
        """Return the objective of a step."""
        return objective(draw, score, family, transformer, self.dtype)

    def _latents(self) -> tuple[int, int, int]:
        """Return the shape of the latents of a picture."""
        side = (self.config.data.resolution or 0) // reduction(self.shape.vae.config)
        channels = self.family.denoiser.shape(self.shape.transformer.config).channels
        return channels, side, side


def objective(
    draw: Drawer, score: Reward, family: Family, transformer: nn.Module, dtype: torch.dtype
) -> Objective[PictureBatch | Batch]:
    """Return the objective of a step: of pictures that are scored, and of the prior's examples."""
    of_pictures = RewardObjective(draw.pictures, score)

    def losses(batch: PictureBatch | Batch) -> Tensor:
        if isinstance(batch, Batch):
            return model_loss(family, transformer, batch, dtype)
        return of_pictures(batch)

    return losses


def drawer(
    config: Config, runtime: pipeline.Runtime, family: Family, transformer: nn.Module, vae: Any
) -> Drawer:
    """Return what draws the pictures of training, by the settings of a plan."""
    reward = config.reward
    return Drawer(
        family,
        transformer,
        load_scheduler(runtime.folder, family),
        vae,
        steps=reward.steps or FEW_STEPS,
        guidance=reward.guidance or 0.0,
        decoded_at_once=reward.decode_at_once,
        dtype=runtime.dtype,
    )


def workshop(config: Config, folder: Path, device: torch.device) -> Workshop:
    return Workshop(config, default_scorer(folder), device)


def _row(at: int, row: dict[str, str]) -> dict[str, Any]:
    """Return the row of dataset.json of a prompt."""
    digest = hashlib.sha256("\0".join(row.values()).encode()).hexdigest()
    name = f"prompt {at:04d}"
    return {"file": name, "sha256": digest, "caption": row["prompt"], "split": "train"}


def make_plan(config: Config, dry_run: bool = False) -> RewardPlan:
    """Resolve the model, the device, the prompts and the rewards, and check all of them.

    Args:
        dry_run: the plan is only shown, so a published model may be planned by its known shape.

    Raises:
        ConfigError, DataError, ModelError: something is missing or does not fit.
    """
    if config.reward.prompts is None:
        raise ConfigError(
            "--reward without prompts", "a file with one prompt a line", "pass --prompts FILE"
        )
    if config.data.style_dir is not None:
        raise ConfigError(
            "--reward with --style-dir",
            "one of them",
            "leave --style-dir out, or use its pictures as a reward: --reward style:DIR",
        )
    folder, shape = model_of(config, dry_run)
    device = devices.choose_device(config.compute.device)
    resolution = config.data.resolution or shape.native_resolution
    trained = read_prompt_file(
        resources.find_file(config.reward.prompts, "prompts"), config.data.trigger
    )
    default = shipped_prompts(folder, "grid")
    file = resources.find_file(config.sample.prompts or default, "prompts")
    prompts = read_prompt_file(file, config.data.trigger)
    check_sizes(shape, resolution)
    check_words(config, shape.family, folder, Prompts([*trained.prompts, *prompts.prompts]))
    if folder.is_dir():
        _check_scheduler(folder, shape.family)
    prior = checked_prior(config, folder, shape, resolution, NO_STYLE)
    pipeline.tensor_cache(config).check()
    resolved = resolve(config, folder, shape, device)
    _resolve_reward_(resolved)
    notes = workshop(resolved, folder, device).check(dry_run)
    if seen := len(set(trained.texts) & set(prompts.texts)):
        notes.append(f"{seen} of the prompts to sample are trained on; others show more")
    plan = RewardPlan(
        config=resolved,
        model_folder=folder,
        device=device,
        dtype=devices.choose_dtype(resolved.compute.dtype, device),
        prompts=prompts,
        shape=shape,
        prior=prior,
        trained=trained,
        notes=notes,
    )
    plan.resolve_rows_()
    return plan


def _check_scheduler(folder: Path, family: Family) -> None:
    """Raise ConfigError for a scheduler that draws noise in each step: probes could not be
    compared.
    """
    kind = type(load_scheduler(folder, family)).__name__
    if kind.startswith(DRAWS_NOISE):
        raise ConfigError(
            f"rewards with the scheduler {kind}, which draws noise in each step",
            "a scheduler whose pictures follow from their first noise, such as EulerDiscrete",
            "put the config of such a scheduler into a copy of the model's folder",
        )


def _resolve_reward_(config: Config) -> None:
    """Give the settings of rewards whole paths, and the steps and the guidance of pictures."""
    reward, sample = config.reward, config.sample
    reward.scores = [one.with_whole_path().text for one in reward.names]
    if reward.second is not None and reward.second != "none":
        reward.second = RewardName.parse(reward.second).with_whole_path().text
    reward.steps = reward.steps or min(FEW_STEPS, sample.steps or FEW_STEPS)
    if reward.guidance is None:
        reward.guidance = sample.guidance
