"""Flags that several verbs share."""

import argparse

from qzo_diffusion.config.arguments import level, path, path_text

Flags = dict[str, tuple[str, str]]
"""Flags that are settings by another name: flag -> (key of the setting, help)."""


def add_tuned_between(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tuned-between",
        type=level,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="noise levels with tuned scales, the base's elsewhere; default: the run's own",
    )


def add_output(verb: argparse.ArgumentParser) -> None:
    """Flags on what a verb shows."""
    verb.add_argument("--json", action="store_true", help="print the results as JSON on stdout")
    verb.add_argument(
        "--quiet", action="store_true", help="show warnings, errors and results alone"
    )


def add_output_dir(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--output-dir", type=path, required=True)


def add_settings(verb: argparse.ArgumentParser, flags: Flags) -> None:
    """The flags, --config, and any setting as key=value."""
    for flag, (key, text) in flags.items():
        verb.add_argument(
            flag, metavar=flag.removeprefix("--").upper().replace("-", "_"), help=f"{text} ({key})"
        )
    verb.add_argument("--config", help="YAML file of settings; flags win over it")
    add_output(verb)
    verb.add_argument(
        "settings",
        nargs="*",
        metavar="section.key=value",
        help="any setting, for example train.lr=1e-3",
    )


def add_training(verb: argparse.ArgumentParser, flags: Flags) -> None:
    """Flags of every training, whatever it trains."""
    add_settings(verb, flags)
    verb.add_argument(
        "--output-dir", type=path, help="folder of the run; default outputs/<date>-<name>"
    )
    verb.add_argument(
        "--resume",
        type=path_text,
        metavar="latest|PATH",
        help="go on with a run; latest: --output-dir, or the newest in outputs/",
    )
    verb.add_argument(
        "--force", action="store_true", help="resume although settings or data changed"
    )
    verb.add_argument(
        "--dry-run", action="store_true", help="print settings, data and plan, and do nothing"
    )
    verb.add_argument(
        "--trial-step",
        action="store_true",
        help="with --dry-run: load the model and measure the time and memory of one step",
    )
