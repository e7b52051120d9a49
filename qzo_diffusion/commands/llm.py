"""`qzo-diffuse llm train` and `llm evaluate`: a language model on a task."""

import argparse
from typing import Any

from qzo_diffusion.commands.flags import Flags, add_settings, add_training
from qzo_diffusion.commands.training import checked_settings, run_training
from qzo_diffusion.config.arguments import path
from qzo_diffusion.system.console import DONE, emit

FLAGS: Flags = {
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

TRAIN_FLAGS: Flags = FLAGS | {
    "--max-steps": ("train.max_steps", "number of steps"),
    "--objective": ("objective", "loss, accuracy or f1"),
    "--seed": ("train.seed", "seed of directions and order"),
}


def add(verbs: Any) -> None:
    llm = verbs.add_parser("llm", help="tune a language model on a task, or evaluate it")
    inner = llm.add_subparsers(required=True, metavar="train|evaluate")
    training = inner.add_parser("train", help="tune a language model on a task")
    add_training(training, TRAIN_FLAGS)
    training.set_defaults(verb=train)
    evaluation = inner.add_parser("evaluate", help="accuracy or F1 on the task's test examples")
    evaluation.add_argument(
        "--run",
        type=path,
        help="a run folder or one of its checkpoints; default: the model as it is",
    )
    add_settings(evaluation, FLAGS)
    evaluation.set_defaults(verb=evaluate)


def train(options: argparse.Namespace) -> int:
    from qzo_diffusion.config.llm import LlmConfig

    resumed, config = checked_settings(options, TRAIN_FLAGS, LlmConfig, "llm")
    from qzo_diffusion.runs.llm.plan import make_plan

    return run_training(options, resumed, make_plan(config, former=resumed), "llm")


def evaluate(options: argparse.Namespace) -> int:
    from qzo_diffusion.config.files import resolve_settings
    from qzo_diffusion.config.llm import LlmConfig
    from qzo_diffusion.runs.locate import locate

    run = None if options.run is None else locate(options.run).need("llm").run()
    config = resolve_settings(options, run, FLAGS, LlmConfig)
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
