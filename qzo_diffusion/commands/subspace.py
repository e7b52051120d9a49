"""`qzo-diffuse subspace`: the directions that a base model's own styles have in common."""

import argparse
from typing import Any

from qzo_diffusion.commands.flags import Flags, add_output_dir, add_settings
from qzo_diffusion.config.arguments import count, path_text
from qzo_diffusion.system.console import DONE, emit, report

FLAGS: Flags = {
    "--model": ("model", "auto, tiny, a Hub id in the local cache, or a pipeline folder"),
    "--family": ("family", "the model's family, where its files don't tell it"),
    "--transformer": (
        "transformer",
        "another one than the model's own: a folder, or a single file, safetensors or GGUF",
    ),
    "--max-steps": ("train.max_steps", "steps of each style, by exact gradients; default 32"),
}


def add(verbs: Any) -> None:
    subspace = verbs.add_parser(
        "subspace",
        help="once for a base model, by gradients: find the directions of its styles, along which "
        "runs then go by forward passes (qzo.subspace)",
        description="The base draws things in styles that it knows, and each style is followed by "
        "a few steps of the exact gradient. Writes subspace.safetensors, and pictures.png to look "
        "at. Once for a base model: minutes for tiny, hours for a large model. A second call goes "
        "on with what is missing.",
    )
    subspace.add_argument(
        "--styles",
        type=path_text,
        help="file with one style a line, such as `watercolor`, that the model can draw; default: "
        "styles.txt, or tiny_styles.txt, which ship",
    )
    subspace.add_argument(
        "--prompts",
        type=path_text,
        help="file with one thing a line, which is drawn in each style; default: things.txt, or "
        "tiny_things.txt",
    )
    subspace.add_argument(
        "--directions",
        type=count,
        default=256,
        help="how many to keep, at the most one for each step and place; default 256",
    )
    add_output_dir(subspace)
    add_settings(subspace, FLAGS)
    subspace.set_defaults(verb=run)


def run(options: argparse.Namespace) -> int:
    from qzo_diffusion.config.defaults import flat
    from qzo_diffusion.config.files import resolve_settings
    from qzo_diffusion.config.style import Config
    from qzo_diffusion.runs.style import learn_subspace

    start = learn_subspace.SETTINGS
    config = resolve_settings(options, None, FLAGS, Config, start, flat(start))
    request = learn_subspace.SubspaceRequest(
        config, options.output_dir, options.styles, options.prompts, options.directions
    )
    try:
        results = learn_subspace.run(request)
    except KeyboardInterrupt:
        report("stopped; the same command goes on with what is missing")
        raise
    file, count = results["file"], results["directions"]
    told = f"done: {file}, {count} directions\ntrain with it, and keep it: qzo.subspace={file}"
    emit(results, options.json, told)
    return DONE
