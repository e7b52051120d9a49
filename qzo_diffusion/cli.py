"""The command line: verbs, flags and exit codes.

Heavy libraries are imported when a verb runs, so `--help` answers at once.
"""

import argparse
import logging
import os
import stat
import sys
from collections.abc import Callable, Sequence
from typing import Any

from qzo_diffusion import __version__
from qzo_diffusion.commands import doctor, llm, mix, replay, sample, train, validate
from qzo_diffusion.commands import report as report_command
from qzo_diffusion.config.arguments import (
    Parser,
    check_names,
    path,
    path_text,
)
from qzo_diffusion.console import DONE, INTERRUPTED, MENDABLE, emit, report, show
from qzo_diffusion.streams import unbreakable


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb. Returns the exit code; argparse exits by itself."""
    with unbreakable():
        return _main(arguments)


# Read when the libraries are imported. Every model, tokenizer and data set comes from this machine.
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DISABLE_TELEMETRY": "1",
}


def _main(arguments: Sequence[str] | None) -> int:
    os.environ.update(OFFLINE)
    os.umask(os.umask(0o077) | stat.S_IWOTH)  # nothing that a verb makes is world-writable
    # a note on an optional package that nobody asked for
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        options = parse(arguments)
        verb: Callable[[argparse.Namespace], int] = options.verb
        code = verb(options)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        # one place decides what a user sees; our own bugs keep their traceback
        from qzo_diffusion.core.errors import UserError
        from qzo_diffusion.runs.publish import without_secrets

        if isinstance(error, UserError):
            report(without_secrets(f"qzo-diffuse: {type(error).__name__}\n{error}"))
            return MENDABLE
        raise


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """argparse takes the key=value settings of `train` in one place only; here they may stand
    anywhere between the flags.
    """
    check_names(sys.argv[1:] if arguments is None else arguments)
    parser = make_parser()
    options, rest = parser.parse_known_args(arguments)
    settings = getattr(options, "settings", None)
    wrong = [text for text in rest if settings is None or text.startswith("-") or "=" not in text]
    if wrong:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if rest and settings is not None:
        settings.extend(rest)
    return options


def make_parser() -> Parser:
    parser = Parser(
        prog="qzo-diffuse",
        description="Tune a 4-bit diffusion model on a folder of images by forward passes alone.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    train.add(verbs)
    sample.add(verbs)
    _add_evaluate_and_report(verbs)
    llm.add(verbs)
    replay.add(verbs)
    mix.add(verbs)
    _add_export(verbs)
    validate.add(verbs)
    doctor.add(verbs)
    return parser


def _add_evaluate_and_report(verbs: Any) -> None:
    evaluate = verbs.add_parser(
        "evaluate", help="score a run, base against tuned, or a folder of images; compare runs"
    )
    what = evaluate.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", type=path, help="a run folder or one of its checkpoints")
    what.add_argument("--images", type=path, help="a folder of images, in the order of the prompts")
    what.add_argument(
        "--compare",
        type=path,
        nargs="+",
        metavar="RUN",
        help="runs that were evaluated, in one table",
    )
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
    evaluate.add_argument("--json", action="store_true", help="print the results as JSON on stdout")
    evaluate.set_defaults(verb=_evaluate)
    report_command.add(verbs)


def _add_export(verbs: Any) -> None:
    export = verbs.add_parser(
        "export", help="write a run's tuned model in a form that other programs load"
    )
    export.add_argument(
        "--run", type=path, required=True, help="a run folder, one of its checkpoints, or a mix"
    )
    formats = ("nf4", "bf16", "delta", "journal", "native")
    export.add_argument(
        "--format",
        choices=formats,
        required=True,
        help="nf4: diffusers, 4 bit; bf16: diffusers and ComfyUI",
    )
    export.add_argument("--output-dir", type=path, required=True)
    export.add_argument("--json", action="store_true", help="print the results as JSON on stdout")
    export.set_defaults(verb=_export)


def _evaluate(options: argparse.Namespace) -> int:
    from qzo_diffusion.commands import evaluate as evaluate_run
    from qzo_diffusion.runs.style import scoring as score_run

    if options.compare:
        results, table = evaluate_run.compare(options.compare, options.output)
        if options.json:
            emit(results, True, table)
        else:
            show(table)
        return DONE
    chosen = (options.prompts, options.style_dir, options.scorer, options.output)
    if options.images:
        results = score_run.run(score_run.ScoreRequest(options.images, *chosen))
        line = score_run.in_words(results["clip_score"])
    else:
        results = evaluate_run.run(evaluate_run.EvaluateRequest(options.run, *chosen))
        line = "\n".join(entry["text"] for entry in results["verdict"])
    emit(results, options.json, line)
    return DONE


def _export(options: argparse.Namespace) -> int:
    from qzo_diffusion.commands import export as export_run
    from qzo_diffusion.runs.llm import export as llm_export
    from qzo_diffusion.runs.locate import locate

    if locate(options.run).kind() == "llm":
        results = llm_export.run(options.run, options.format, options.output_dir)
        emit(
            results, options.json, f"done: {options.output_dir}\nto score it: {results['lm_eval']}"
        )
    else:
        emit(
            export_run.run(options.run, options.format, options.output_dir),
            options.json,
            f"done: {options.output_dir}",
        )
    return DONE


if __name__ == "__main__":
    sys.exit(main())
