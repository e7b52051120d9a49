"""The command line: verbs, flags and exit codes.

Heavy libraries are imported when a verb runs, so `--help` answers at once.
"""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qzo_diffusion import __version__
from qzo_diffusion.config.arguments import (
    Parser,
    check_names,
    count,
    not_negative,
    path,
    path_text,
    seed,
    strength,
    weighted,
    whole,
)
from qzo_diffusion.console import emit, report, show

if TYPE_CHECKING:
    from qzo_diffusion.config.files import AnyConfig
    from qzo_diffusion.runs.training import Plan

Flags = dict[str, tuple[str, str]]  # flag -> (key of the setting, help)

DONE, MENDABLE, INTERRUPTED = 0, 2, 130

LLM_FLAGS: Flags = {
    "--task": (
        "task",
        "a task that comes along (sst2, rte, cb, boolq, squad, sst2_review) or a task file",
    ),
    "--model": ("model", "a transformers folder, or a Hub id in the local cache"),
    "--data-dir": (
        "data.dir",
        "folder of the task's data files, or a dataset's Hub id in the local cache",
    ),
    "--method": ("method", "qzo, mezo, quzo, quzo-lora, qlora or fo-scales"),
}

LLM_TRAIN_FLAGS: Flags = LLM_FLAGS | {
    "--max-steps": ("train.max_steps", "number of steps"),
    "--objective": ("objective", "loss, accuracy or f1"),
    "--seed": ("train.seed", "seed of directions and order"),
}

TRAIN_FLAGS: Flags = {
    "--style-dir": ("data.style_dir", "folder of images in the style; captions beside them"),
    "--model": ("model", "auto, tiny, a Hub id in the local cache, or a pipeline folder"),
    "--caption": ("data.caption", "caption of images that have none; may hold [trigger]"),
    "--trigger": ("data.trigger", "word that replaces [trigger] in captions and prompts"),
    "--max-steps": ("train.max_steps", "number of steps"),
    "--method": ("method", "qzo, quzo (integer codes) or fo-scales (by gradients)"),
    "--seed": ("train.seed", "seed of directions, noise and order"),
    "--sample-prompts": ("sample.prompts", "file with one prompt a line"),
    "--sample-every": ("sample.every", "steps between sample grids; 0: only first and last"),
    "--validation-dir": ("data.validation_dir", "held-out images in the style"),
    "--init-from": (
        "init_from",
        "a run, one of its checkpoints or a delta to begin with in place of the model as it is",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    # a note on an optional package that nobody asked for
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        options = parse(arguments)
        verb: Callable[[argparse.Namespace], int] = options.verb
        return verb(options)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        # one place decides what a user sees; our own bugs keep their traceback
        from qzo_diffusion.core.errors import UserError

        if isinstance(error, UserError):
            report(f"qzo-diffuse: {type(error).__name__}\n{error}")
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
    _add_train(verbs)
    _add_sample(verbs)
    _add_evaluate_and_report(verbs)
    _add_llm(verbs)
    _add_replay_and_mix(verbs)
    _add_export(verbs)
    validate = verbs.add_parser(
        "validate", help="check a config file and show it with all defaults"
    )
    validate.add_argument("--config", required=True, help="a YAML file, or a shipped one by name")
    validate.set_defaults(verb=_validate)
    doctor = verbs.add_parser("doctor", help="check this machine and say what a run will use")
    doctor.add_argument("--json", action="store_true", help="print the facts as JSON")
    doctor.set_defaults(verb=_doctor)
    return parser


def _add_train(verbs: Any) -> None:
    train = verbs.add_parser(
        "train", help="tune a model's quantization scales on a folder of images"
    )
    train.add_argument("--preset", help="a shipped config by name, for example paper")
    train.add_argument(
        "--strict",
        action="store_true",
        help="stop at the first image that can't be used (data.strict)",
    )
    _add_training_arguments(train, TRAIN_FLAGS)
    train.set_defaults(verb=_train)


def _add_training_arguments(train: argparse.ArgumentParser, flags: Flags) -> None:
    """What every training has, whatever it trains."""
    _add_settings(train, flags)
    train.add_argument(
        "--output-dir", type=path, help="folder of the run; default outputs/<date>-<name>"
    )
    train.add_argument(
        "--resume",
        type=path_text,
        metavar="latest|PATH",
        help="go on with a run; latest: --output-dir, or the newest in outputs/",
    )
    train.add_argument(
        "--force", action="store_true", help="resume although settings or data changed"
    )
    train.add_argument(
        "--dry-run", action="store_true", help="print settings, data and plan, and do nothing"
    )


def _add_settings(verb: argparse.ArgumentParser, flags: Flags) -> None:
    for flag, (key, text) in flags.items():
        verb.add_argument(
            flag, metavar=flag.removeprefix("--").upper().replace("-", "_"), help=f"{text} ({key})"
        )
    verb.add_argument("--config", help="YAML file of settings; flags win over it")
    verb.add_argument("--json", action="store_true", help="print the results as JSON on stdout")
    verb.add_argument(
        "settings",
        nargs="*",
        metavar="section.key=value",
        help="any setting, for example train.lr=1e-3",
    )


def _add_llm(verbs: Any) -> None:
    llm = verbs.add_parser("llm", help="tune a language model on a task, or evaluate it")
    inner = llm.add_subparsers(required=True, metavar="train|evaluate")
    train = inner.add_parser("train", help="tune a language model on a task")
    _add_training_arguments(train, LLM_TRAIN_FLAGS)
    train.set_defaults(verb=_llm_train)
    evaluate = inner.add_parser("evaluate", help="accuracy or F1 on the task's test examples")
    evaluate.add_argument(
        "--run",
        type=path,
        help="a run folder or one of its checkpoints; default: the model as it is",
    )
    _add_settings(evaluate, LLM_FLAGS)
    evaluate.set_defaults(verb=_llm_evaluate)


def _add_sample(verbs: Any) -> None:
    sample = verbs.add_parser(
        "sample", help="make images from a model, with or without a run's tuned scales"
    )
    sample.add_argument("--model", type=path_text, help="default: the run's model, or auto")
    sample.add_argument("--run", type=path, help="a run folder or one of its checkpoints")
    sample.add_argument(
        "--strength", type=strength, default=1.0, help="0: the base, 1: as tuned; default 1"
    )
    prompts = sample.add_mutually_exclusive_group()
    prompts.add_argument("--prompts", type=path_text, help="file with one prompt a line")
    prompts.add_argument(
        "--prompt", action="append", metavar="TEXT", help="one prompt; may be given several times"
    )
    sample.add_argument("--negative-prompt", help="prompt that guidance leads away from")
    sample.add_argument("--steps", type=count, help="sampling steps; default: as suits the model")
    sample.add_argument(
        "--guidance", type=not_negative, help="guidance scale; default: as suits the model"
    )
    sample.add_argument("--output-dir", type=path, required=True)
    sample.add_argument("--seed", type=seed, help="prompt i is sampled from seed + i")
    sample.add_argument("--json", action="store_true", help="print the results as JSON on stdout")
    sample.set_defaults(verb=_sample)


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
    report = verbs.add_parser("report", help="write one self-contained page on a run")
    report.add_argument("--run", type=path, required=True)
    report.add_argument("--output", type=path, help="default: report.html in the run")
    report.add_argument("--json", action="store_true", help="print the results as JSON on stdout")
    report.set_defaults(verb=_report)


def _add_replay_and_mix(verbs: Any) -> None:
    replay = verbs.add_parser(
        "replay", help="rebuild the scales of any step from a journal and the base model"
    )
    replay.add_argument("--journal", type=path, required=True, help="journal.qzo of a run")
    replay.add_argument("--model", type=path_text, help="default: the model that the journal names")
    replay.add_argument("--to-step", type=whole, help="number of steps to apply; default all")
    replay.add_argument(
        "--init-from",
        type=path_text,
        metavar="RUN",
        help="what the run began with; default: where the journal says it was",
    )
    mix = verbs.add_parser("mix", help="combine what several runs changed")
    mix.add_argument(
        "--run",
        action="append",
        required=True,
        type=weighted,
        metavar="RUN=WEIGHT",
        help="may be given several times",
    )
    for verb, function in ((replay, _replay), (mix, _mix)):
        verb.add_argument("--output-dir", type=path, required=True)
        verb.add_argument("--json", action="store_true", help="print the results as JSON on stdout")
        verb.set_defaults(verb=function)


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


def _train(options: argparse.Namespace) -> int:
    from qzo_diffusion.config.style import Config

    resumed, config = _checked_settings(options, TRAIN_FLAGS, Config)
    from qzo_diffusion.runs.style.plan import make_plan

    return _run_training(options, resumed, make_plan(config))


def _llm_train(options: argparse.Namespace) -> int:
    from qzo_diffusion.config.llm import LlmConfig

    resumed, config = _checked_settings(options, LLM_TRAIN_FLAGS, LlmConfig)
    from qzo_diffusion.runs.llm.plan import make_plan

    return _run_training(options, resumed, make_plan(config))


def _checked_settings(
    options: argparse.Namespace, flags: Flags, kind: "type[AnyConfig]"
) -> "tuple[Path | None, AnyConfig]":
    """The run that goes on, if one does, and the settings; both without torch, so that a typo is
    told at once.
    """
    from qzo_diffusion.config.files import resolve_settings
    from qzo_diffusion.core.errors import ConfigError
    from qzo_diffusion.runs.locate import to_resume

    resumed = to_resume(options.resume, options.output_dir) if options.resume else None
    if resumed is not None and options.output_dir not in (None, resumed):
        raise ConfigError(
            f"--resume {options.resume} with --output-dir {options.output_dir}",
            "one of them; a run goes on in its own folder",
            "leave --output-dir out",
        )
    return resumed, resolve_settings(options, resumed, flags, kind)


def _llm_evaluate(options: argparse.Namespace) -> int:
    from qzo_diffusion.config.files import resolve_settings
    from qzo_diffusion.config.llm import LlmConfig
    from qzo_diffusion.runs.locate import locate

    run = None if options.run is None else locate(options.run).need("llm").run()
    config = resolve_settings(options, run, LLM_FLAGS, LlmConfig)
    from qzo_diffusion.runs.llm import plan as llm_run

    results = llm_run.evaluate(config, options.run)
    metric = results["metric"]
    width = f" ± {results['ci95']:.4f}" if "ci95" in results else ""
    line = (
        f"{metric} {results[metric]:.4f}{width} on {results['test_examples']} examples of "
        f"{results['task']}"
    )
    emit(results, options.json, line)
    return DONE


def _run_training(options: argparse.Namespace, resumed: Path | None, plan: "Plan") -> int:
    """A new run, or one that goes on, of whatever the plan trains."""
    from qzo_diffusion.runs import training as training_run
    from qzo_diffusion.runs.locate import default_output_dir

    if options.dry_run:
        show(plan.describe())
        return DONE
    report(plan.summary())
    if resumed is not None:
        output_dir, results = resumed, training_run.resume(plan, resumed, force=options.force)
    else:
        name = f"{date.today().isoformat()}-{plan.name}"
        output_dir = options.output_dir or default_output_dir(Path("outputs"), name)
        results = training_run.run(plan, output_dir)
    if not results:  # one of several processes, and not the one that tells
        return DONE
    emit(results, options.json, f"done: {output_dir}")
    return INTERRUPTED if results["stopped"] else DONE


def _sample(options: argparse.Namespace) -> int:
    from qzo_diffusion.commands import sample as sample_run

    request = sample_run.SampleRequest(
        output_dir=options.output_dir,
        model=options.model,
        run=options.run,
        strength=options.strength,
        prompts=options.prompt or options.prompts,
        negative_prompt=options.negative_prompt,
        steps=options.steps,
        guidance=options.guidance,
        seed=options.seed,
    )
    results = sample_run.run(request)
    emit(results, options.json, f"done: {results['samples']}")
    return DONE


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
        found = results["clip_score"]
        line = (
            f"CLIP score {found['mean']:.4f} of {found['n']} images, by "
            f"{found['note'] or found['model']}"
        )
    else:
        results = evaluate_run.run(evaluate_run.EvaluateRequest(options.run, *chosen))
        line = "\n".join(entry["text"] for entry in results["verdict"])
    emit(results, options.json, line)
    return DONE


def _report(options: argparse.Namespace) -> int:
    from qzo_diffusion.runs import report as report_run

    results = report_run.run(options.run, options.output)
    emit(results, options.json, f"done: {results['report']}")
    return DONE


def _replay(options: argparse.Namespace) -> int:
    from qzo_diffusion.commands import replay as replay_run

    results = replay_run.run(
        options.journal, options.model, options.to_step, options.output_dir, options.init_from
    )
    emit(results, options.json, f"done: step {results['steps']} in {options.output_dir}")
    return DONE


def _mix(options: argparse.Namespace) -> int:
    from qzo_diffusion.commands import mix as mix_run

    emit(mix_run.run(options.run, options.output_dir), options.json, f"done: {options.output_dir}")
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


def _validate(options: argparse.Namespace) -> int:
    from qzo_diffusion.config.files import find_config, kind_of, make_config, read_yaml

    settings = read_yaml(find_config(options.config))
    print(make_config(settings, kind_of(settings)).to_yaml(), end="")
    return DONE


def _doctor(options: argparse.Namespace) -> int:
    from qzo_diffusion.commands import doctor

    facts = doctor.examine()
    if options.json:
        print(json.dumps(facts, indent=1))
    else:
        show(doctor.as_text(facts))
    return MENDABLE if facts["problems"] else DONE


if __name__ == "__main__":
    sys.exit(main())
