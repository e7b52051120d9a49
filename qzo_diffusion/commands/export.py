"""`qzo-diffuse export`: a run's tuned model in a form that other programs load."""

import argparse
from typing import Any

from qzo_diffusion.commands.flags import add_json, add_output_dir
from qzo_diffusion.config.arguments import path
from qzo_diffusion.system.console import DONE, emit

FORMATS = ("nf4", "bf16", "delta", "journal", "native")


def add(verbs: Any) -> None:
    export = verbs.add_parser(
        "export", help="write a run's tuned model in a form that other programs load"
    )
    export.add_argument(
        "--run", type=path, required=True, help="a run folder, one of its checkpoints, or a mix"
    )
    export.add_argument(
        "--format",
        choices=FORMATS,
        required=True,
        help="nf4: diffusers, 4 bit; bf16: diffusers and ComfyUI",
    )
    add_output_dir(export)
    add_json(export)
    export.set_defaults(verb=run)


def run(options: argparse.Namespace) -> int:
    from qzo_diffusion.runs.locate import locate

    last = f"done: {options.output_dir}"
    if locate(options.run).kind() == "llm":
        from qzo_diffusion.runs.llm import export as of_texts

        results = of_texts.run(options.run, options.format, options.output_dir)
        last += f"\nto score it: {results['lm_eval']}"
    else:
        from qzo_diffusion.runs.style import export as of_pictures

        results = of_pictures.run(options.run, options.format, options.output_dir)
    emit(results, options.json, last)
    return DONE
