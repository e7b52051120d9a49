"""`qzo-diffuse evaluate`: score a run, base against tuned, or a folder of images; compare runs."""

import argparse
from typing import Any

from qzo_diffusion.commands.flags import add_output, add_tuned_between
from qzo_diffusion.config.arguments import path, path_text
from qzo_diffusion.system.console import DONE, emit, show


def add(verbs: Any) -> None:
    evaluate = verbs.add_parser(
        "evaluate", help="score a run, base against tuned, or a folder of images; compare runs"
    )
    what = evaluate.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", type=path, help="a run folder or one of its checkpoints")
    evaluate.add_argument("--model", type=path_text, help="default: the run's model")
    what.add_argument("--images", type=path, help="a folder of images, in the order of the prompts")
    what.add_argument(
        "--compare",
        type=path,
        nargs="+",
        metavar="RUN",
        help="runs that were evaluated, in one table",
    )
    add_tuned_between(evaluate)
    evaluate.add_argument(
        "--prompts",
        type=path_text,
        help="file with one prompt a line; default: the shipped score prompts",
    )
    evaluate.add_argument(
        "--style-dir", type=path, help="images of the style; default: those the run was trained on"
    )
    evaluate.add_argument(
        "--scorer",
        type=path_text,
        help="MODEL/PRETRAINED of open_clip, a folder, or embedded (default for --model tiny)",
    )
    evaluate.add_argument(
        "--output",
        type=path,
        help="default: evaluation.json in the run; of a checkpoint evaluation_step_N.json",
    )
    add_output(evaluate)
    evaluate.set_defaults(verb=run)


def run(options: argparse.Namespace) -> int:
    if options.compare:
        return _compare(options)
    from qzo_diffusion.runs.style import evaluate, scoring

    chosen = (options.prompts, options.style_dir, options.scorer, options.output)
    if options.images:
        results = scoring.run(scoring.ScoreRequest(options.images, *chosen))
        line = scoring.in_words(results["clip_score"])
    else:
        request = evaluate.EvaluateRequest(
            options.run, *chosen, options.model, options.tuned_between
        )
        results = evaluate.run(request)
        line = "\n".join(entry["text"] for entry in results["verdict"])
    emit(results, options.json, line)
    return DONE


def _compare(options: argparse.Namespace) -> int:
    from qzo_diffusion.runs.style import evaluate

    results, table = evaluate.compare(options.compare, options.output)
    if options.json:
        emit(results, True, table)
    else:
        show(table)
    return DONE
