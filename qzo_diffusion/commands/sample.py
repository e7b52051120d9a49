"""`qzo-diffuse sample`: images from a model, with or without a run's tuned scales."""

import argparse
from typing import Any

from qzo_diffusion.commands.flags import add_output, add_output_dir, add_tuned_between
from qzo_diffusion.config.arguments import count, not_negative, path, path_text, seed, strength
from qzo_diffusion.system.console import DONE, emit


def add(verbs: Any) -> None:
    sample = verbs.add_parser(
        "sample", help="make images from a model, with or without a run's tuned scales"
    )
    sample.add_argument("--model", type=path_text, help="default: the run's model, or auto")
    sample.add_argument(
        "--transformer", type=path_text, help="its transformer from elsewhere, such as a GGUF file"
    )
    sample.add_argument("--family", help="the model's family, where its files don't tell it")
    sample.add_argument("--run", type=path, help="a run folder or one of its checkpoints")
    sample.add_argument(
        "--strength", type=strength, default=1.0, help="0: the base, 1: as tuned; default 1"
    )
    add_tuned_between(sample)
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
    add_output_dir(sample)
    sample.add_argument("--seed", type=seed, help="prompt i is sampled from seed + i")
    add_output(sample)
    sample.set_defaults(verb=run)


def run(options: argparse.Namespace) -> int:
    from qzo_diffusion.runs.style import sample

    request = sample.SampleRequest(
        output_dir=options.output_dir,
        model=options.model,
        transformer=options.transformer,
        family=options.family,
        run=options.run,
        strength=options.strength,
        tuned_between=options.tuned_between,
        prompts=options.prompt or options.prompts,
        negative_prompt=options.negative_prompt,
        steps=options.steps,
        guidance=options.guidance,
        seed=options.seed,
    )
    results = sample.run(request)
    emit(results, options.json, f"done: {results['samples']}")
    return DONE
