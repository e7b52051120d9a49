"""`qzo-diffuse report`: one self-contained page on a run."""

import argparse
from typing import Any

from qzo_diffusion.commands.flags import add_output
from qzo_diffusion.config.arguments import path
from qzo_diffusion.system.console import DONE, emit


def add(verbs: Any) -> None:
    report = verbs.add_parser("report", help="write one self-contained page on a run")
    report.add_argument("--run", type=path, required=True)
    report.add_argument("--output", type=path, help="default: report.html in the run")
    add_output(report)
    report.set_defaults(verb=run)


def run(options: argparse.Namespace) -> int:
    from qzo_diffusion.runs import report

    results = report.run(options.run, options.output)
    emit(results, options.json, f"done: {results['report']}")
    return DONE
