"""Training from the command line, whatever it trains: settings, then a plan, then a run."""

import argparse
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from qzo_diffusion.commands.flags import Flags
from qzo_diffusion.system.console import DONE, INTERRUPTED, emit, report, show

if TYPE_CHECKING:
    from qzo_diffusion.config.files import AnyConfig
    from qzo_diffusion.runs.locate import Kind
    from qzo_diffusion.runs.plan import Plan


def checked_settings(
    options: argparse.Namespace, flags: Flags, config: "type[AnyConfig]", kind: "Kind"
) -> "tuple[Path | None, AnyConfig]":
    """The run that goes on, if one does, and the settings.

    Neither needs torch, so a typo is reported at once.
    """
    from qzo_diffusion.config.files import resolve_settings

    check_flags(options)
    resumed = run_to_resume(options, kind) if options.resume else None
    return resumed, resolve_settings(options, resumed, flags, config)


def check_flags(options: argparse.Namespace) -> None:
    """Raises ConfigError for flags that need another one."""
    from qzo_diffusion.core.errors import ConfigError

    if options.trial_step and not options.dry_run:
        raise ConfigError(
            "--trial-step without --dry-run",
            "both; a trial step is part of a dry run",
            "add --dry-run, or leave --trial-step out",
        )


def run_to_resume(options: argparse.Namespace, kind: "Kind") -> Path:
    """The folder of the run that goes on.

    Raises:
        ConfigError: --output-dir names another folder, or the run is of the other kind.
        OutputError: there is no run.
    """
    from qzo_diffusion.core.errors import ConfigError
    from qzo_diffusion.runs.locate import locate, to_resume

    resumed = to_resume(options.resume, options.output_dir)
    if options.output_dir is not None and options.output_dir.absolute() != resumed.absolute():
        raise ConfigError(
            f"--resume {options.resume} with --output-dir {options.output_dir}",
            "one of them; a run goes on in its own folder",
            "leave --output-dir out",
        )
    locate(resumed).need(kind)
    return resumed


def run_training(
    options: argparse.Namespace, resumed: Path | None, plan: "Plan", kind: "Kind"
) -> int:
    """A new run, or one that goes on, of whatever the plan trains."""
    if options.dry_run:
        show(plan.describe())
        if options.trial_step:
            from qzo_diffusion.runs.trial import trial_step

            show(trial_step(plan))
        return DONE
    from qzo_diffusion.runs import training
    from qzo_diffusion.runs.ending import last_words
    from qzo_diffusion.runs.locate import default_output_dir

    report(plan.summary())
    if resumed is not None:
        results = training.resume(plan, resumed, force=options.force)
    else:
        name = f"{date.today().isoformat()}-{plan.name}"
        results = training.run(
            plan, options.output_dir or default_output_dir(Path("outputs"), name)
        )
    if not results:  # one of several processes, and not the one that reports
        return DONE
    emit(results, options.json, last_words(results, kind))
    return INTERRUPTED if results["stopped"] else DONE
