"""`qzo-diffuse subspace`: the directions that a base model's own styles have in common."""

import argparse
from typing import Any

from qzo_diffusion.commands.flags import Flags, add_output_dir, add_settings
from qzo_diffusion.config.arguments import count, path_text
from qzo_diffusion.system.console import DONE, emit

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
    )
    subspace.add_argument(
        "--styles",
        type=path_text,
        help="file with one style a line, such as `watercolor`, that the model can draw; default: "
        "shipped ones",
    )
    subspace.add_argument(
        "--prompts",
        type=path_text,
        help="file with one thing a line, which is drawn in each style; default: shipped ones",
    )
    subspace.add_argument(
        "--directions", type=count, default=256, help="how many at the most; default 256"
    )
    add_output_dir(subspace)
    add_settings(subspace, FLAGS)
    subspace.set_defaults(verb=run)


def run(options: argparse.Namespace) -> int:
    from qzo_diffusion.config.files import resolve_settings
    from qzo_diffusion.config.style import Config
    from qzo_diffusion.runs.style import learn_subspace

    config = resolve_settings(options, None, FLAGS, Config, learn_subspace.SETTINGS)
    request = learn_subspace.SubspaceRequest(
        config, options.output_dir, options.styles, options.prompts, options.directions
    )
    results = learn_subspace.run(request)
    file = results["file"]
    emit(results, options.json, f"done: {file}\ntrain with it: qzo.subspace={file}")
    return DONE
