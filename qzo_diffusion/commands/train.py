"""`qzo-diffuse train`: tune a model's quantization scales on a folder of images."""

import argparse
from typing import TYPE_CHECKING, Any

from qzo_diffusion.commands.flags import Flags, add_training
from qzo_diffusion.commands.training import checked_settings, run_training

if TYPE_CHECKING:
    from qzo_diffusion.config.style import Config
    from qzo_diffusion.runs.plan import Plan

FLAGS: Flags = {
    "--style-dir": ("data.style_dir", "folder of images in the style; captions beside them"),
    "--model": ("model", "auto, tiny, a Hub id in the local cache, or a pipeline folder"),
    "--family": ("family", "the model's family, where its files don't tell it"),
    "--transformer": (
        "transformer",
        "another one than the model's own: a folder, or a single file, safetensors or GGUF",
    ),
    "--caption": ("data.caption", "caption of images that have none; may hold [trigger]"),
    "--trigger": ("data.trigger", "word that replaces [trigger] in captions and prompts"),
    "--max-steps": ("train.max_steps", "number of steps"),
    "--method": ("method", "qzo, quzo (integer codes) or fo-scales (by gradients)"),
    "--seed": ("train.seed", "seed of directions, noise and order"),
    "--sample-prompts": ("sample.prompts", "file with one prompt a line"),
    "--sample-every": ("sample.every", "steps between sample grids; 0: only first and last"),
    "--prompts": ("reward.prompts", "file with one prompt a line, to train on by --reward"),
    "--validation-dir": ("data.validation_dir", "held-out images in the style"),
    "--init-from": (
        "init_from",
        "a run, one of its checkpoints or a delta to begin with in place of the model as it is",
    ),
}


def add(verbs: Any) -> None:
    train = verbs.add_parser(
        "train", help="tune a model's quantization scales on a folder of images"
    )
    train.add_argument("--preset", help="a shipped config by name, for example paper")
    train.add_argument(
        "--strict",
        action="store_true",
        help="stop at the first image that can't be used (data.strict)",
    )
    train.add_argument(
        "--reward",
        action="append",
        metavar="NAME[:ARG][=WEIGHT]",
        help="tune pictures of --prompts by a score; may be given several times (reward.scores)",
    )
    add_training(train, FLAGS)
    train.set_defaults(verb=run)


def run(options: argparse.Namespace) -> int:
    from qzo_diffusion.config.style import Config

    resumed, config = checked_settings(options, FLAGS, Config, "style")
    dry_run = options.dry_run and not options.trial_step
    return run_training(options, resumed, plan_of(config, dry_run), "style")


def plan_of(config: "Config", dry_run: bool = False) -> "Plan":
    """The plan of a run on rewards, or on a style folder."""
    if config.reward.by_votes:
        from qzo_diffusion.core.errors import ConfigError

        raise ConfigError(
            "a run on votes",
            "a run without a person",
            "use the verb vote: qzo-diffuse vote --run RUN",
        )
    if config.reward.scores:
        from qzo_diffusion.runs.style import reward_plan

        return reward_plan.make_plan(config, dry_run)
    from qzo_diffusion.runs.style.plan import make_plan

    return make_plan(config, dry_run)
