"""`qzo-diffuse replay`: the scales of any step, from the base model and a journal alone."""

import argparse
from typing import Any

from qzo_diffusion.commands.flags import add_output, add_output_dir
from qzo_diffusion.config.arguments import path, path_text, whole
from qzo_diffusion.system.console import DONE, emit


def add(verbs: Any) -> None:
    replay = verbs.add_parser(
        "replay", help="rebuild the scales of any step from a journal and the base model"
    )
    replay.add_argument("--journal", type=path, required=True, help="journal.qzo of a run")
    replay.add_argument("--model", type=path_text, help="default: the model that the journal names")
    replay.add_argument(
        "--transformer",
        type=path_text,
        help="of pictures; default: the folder or file that the journal names",
    )
    replay.add_argument("--to-step", type=whole, help="number of steps to apply; default all")
    replay.add_argument(
        "--init-from",
        type=path_text,
        metavar="RUN",
        help="the run that this one began with; default: the folder that the journal names",
    )
    add_output_dir(replay)
    add_output(replay)
    replay.set_defaults(verb=run)


def run(options: argparse.Namespace) -> int:
    from qzo_diffusion.runs.llm import replay as of_texts
    from qzo_diffusion.runs.replay import read, replay
    from qzo_diffusion.runs.style import replay as of_pictures

    journal = read(options.journal, options.to_step, options.output_dir)
    if journal.header.get("kind") == "llm":
        base = of_texts.base(of_texts.config_of(journal, options.model), options.journal.parent)
    else:
        config = of_pictures.config_of(
            journal, options.model, options.init_from, options.transformer
        )
        base = of_pictures.base(config)
    results = replay(journal, base, options.to_step, options.output_dir)
    emit(results, options.json, f"done: step {results['steps']} in {options.output_dir}")
    return DONE
