"""`qzo-diffuse mix`: one set of scales from the changes of several runs."""

import argparse
from typing import Any

from qzo_diffusion.commands.flags import add_output, add_output_dir
from qzo_diffusion.config.arguments import weighted
from qzo_diffusion.system.console import DONE, emit


def add(verbs: Any) -> None:
    mix = verbs.add_parser("mix", help="add up the changes of several runs")
    mix.add_argument(
        "--run",
        action="append",
        required=True,
        type=weighted,
        metavar="RUN=WEIGHT",
        help="may be given several times",
    )
    add_output_dir(mix)
    add_output(mix)
    mix.set_defaults(verb=run)


def run(options: argparse.Namespace) -> int:
    from qzo_diffusion.runs.style import mix

    results = mix.run(options.run, options.output_dir)
    emit(results, options.json, f"done: {options.output_dir}")
    return DONE
