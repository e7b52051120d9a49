"""`qzo-diffuse export`: a run's tuned model in a form that other programs load."""

import argparse
from typing import Any

from qzo_diffusion.commands.flags import add_output, add_output_dir
from qzo_diffusion.config.arguments import count, path
from qzo_diffusion.core.errors import ConfigError
from qzo_diffusion.system.console import DONE, emit

FORMATS = ("nf4", "bf16", "lora", "delta", "journal", "native", "gguf")
TYPES = ("Q4_0", "Q8_0", "Q4_K_M")
LAYOUTS = ("diffusers", "original", "both")


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
        help="nf4: diffusers, 4 bit; bf16: diffusers or ComfyUI; lora: both, a part of the change",
    )
    export.add_argument(
        "--layout",
        choices=LAYOUTS,
        help="of bf16: diffusers (the default), or original, which ComfyUI reads",
    )
    export.add_argument(
        "--rank", type=count, help="of lora; default 32: more keeps more of the change"
    )
    export.add_argument(
        "--dither",
        action="store_true",
        help="of gguf: round factors so that the mean change of each row is kept",
    )
    export.add_argument(
        "--quantize-to",
        choices=TYPES,
        help="of gguf: the type of a new file, for a run on a base that is no GGUF file",
    )
    add_output_dir(export)
    add_output(export)
    export.set_defaults(verb=run)


def run(options: argparse.Namespace) -> int:
    from qzo_diffusion.runs.locate import locate

    _check(options)
    last = f"done: {options.output_dir}"
    if locate(options.run).kind() == "llm":
        _check_texts(options)
        from qzo_diffusion.runs.llm import export as of_texts

        results = of_texts.run(options.run, options.format, options.output_dir)
        last += f"\nto score it: {results['lm_eval']}"
    else:
        from qzo_diffusion.runs.style import export as of_pictures
        from qzo_diffusion.runs.style.export_gguf import GgufOptions

        chosen = {
            name: value
            for name in ("layout", "rank")
            if (value := getattr(options, name)) is not None
        }
        how = GgufOptions(options.dither, options.quantize_to)
        results = of_pictures.run(
            options.run, options.format, options.output_dir, options=how, **chosen
        )
    emit(results, options.json, last)
    return DONE


def _check(options: argparse.Namespace) -> None:
    """Refuse a flag of another format. Raises ConfigError."""
    for flag, kind in (("layout", "bf16"), ("rank", "lora")):
        if getattr(options, flag) is not None and options.format != kind:
            raise ConfigError(
                f"--{flag} with --format {options.format}",
                f"--format {kind}, which alone has a {flag}",
                f"leave --{flag} out",
            )


def _check_texts(options: argparse.Namespace) -> None:
    """Refuse options that only runs of pictures have. Raises ConfigError."""
    if options.dither or options.quantize_to:
        raise ConfigError(
            "--dither or --quantize-to for a language model",
            "a run of pictures",
            "leave them out; factors are rounded to the nearest number",
        )
