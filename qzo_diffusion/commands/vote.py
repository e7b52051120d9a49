"""`qzo-diffuse vote`: tune pictures by the choices of a person."""

import argparse
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qzo_diffusion.commands.flags import Flags, add_settings
from qzo_diffusion.config.arguments import count, path, whole
from qzo_diffusion.system.console import DONE, INTERRUPTED, emit, report

FLAGS: Flags = {
    "--prompts": ("reward.prompts", "file with one prompt a line, whose pictures are voted on"),
    "--model": ("model", "auto, tiny, a Hub id in the local cache, or a pipeline folder"),
    "--transformer": (
        "transformer",
        "another one than the model's own: a folder, or a single file, safetensors or GGUF",
    ),
    "--family": ("family", "of the model's architecture; default: found from its files"),
    "--trigger": ("data.trigger", "word that replaces [trigger] in prompts"),
    "--seed": ("train.seed", "seed of directions, noise and sides"),
    "--sample-prompts": ("sample.prompts", "file with one prompt a line, which are only shown"),
    "--init-from": ("init_from", "a run, one of its checkpoints or a delta to begin with"),
}


def add(verbs: Any) -> None:
    vote = verbs.add_parser("vote", help="tune pictures by choosing between two, on a local page")
    vote.add_argument(
        "--run",
        type=path,
        required=True,
        help="a new folder, a run on votes to go on with, or another run, whose result is voted "
        "on in a folder inside",
    )
    vote.add_argument("--pairs", type=count, help="pairs in all; default 200, in rounds of 10")
    way = vote.add_mutually_exclusive_group()
    way.add_argument("--port", type=whole, default=0, help="of the page; default: a free one")
    way.add_argument(
        "--export",
        type=path,
        metavar="DIR",
        help="no page: write the pictures of the next round and a form into a new folder",
    )
    way.add_argument(
        "--import",
        dest="import_from",
        type=path,
        metavar="FILE",
        help="no page: take the choices of a form that was filled in",
    )
    vote.add_argument("--force", action="store_true", help="go on although settings changed")
    add_settings(vote, FLAGS)
    vote.set_defaults(verb=run)


def run(options: argparse.Namespace) -> int:
    from qzo_diffusion.runs.style import vote

    place = vote.find_place(options.run)
    config = settings_of(options, place)
    results = vote.run(
        vote.VoteRequest(
            place, config, options.export, options.import_from, options.port, options.force
        )
    )
    emit(results, options.json, last_words(results))
    return INTERRUPTED if results["stopped"] else DONE


def settings_of(options: argparse.Namespace, place: Any) -> Any:
    """Return the settings of the run; `--pairs` is a number of rounds."""
    config = _resolved(options, place)
    if options.pairs is None:
        return config
    size = config.data.batch_size
    rounds = -(-options.pairs // size)
    if rounds * size != options.pairs:
        report(f"note: {rounds * size} pairs, in rounds of {size}")
    options.settings = [*options.settings, f"train.max_steps={rounds}"]
    return _resolved(options, place)


def _resolved(options: argparse.Namespace, place: Any) -> Any:
    from qzo_diffusion.config.defaults import OF_VOTES
    from qzo_diffusion.config.files import resolve_settings
    from qzo_diffusion.config.reward import VOTES
    from qzo_diffusion.config.style import Config
    from qzo_diffusion.core.errors import ConfigError

    start = {} if place.begun else dict(place.settings)
    start["reward"] = {**start.get("reward", {}), "scores": [VOTES]}
    begun = place.run if place.begun else None
    unused = () if place.begun else OF_VOTES
    config = resolve_settings(options, begun, FLAGS, Config, start, unused)
    if not config.reward.by_votes:
        raise ConfigError(
            f"reward.scores = {config.reward.scores} with vote",
            f"[{VOTES}], which vote sets",
            "leave reward.scores out, or use train --reward",
        )
    return config


def last_words(results: Mapping[str, Any]) -> str:
    """Return lines for a person at the end."""
    from qzo_diffusion.runs.ending import last_words as of_run

    pairs = f"{results['pairs_done']} of {results['pairs']} pairs in finished rounds"
    if results["pairs_in_hand"]:
        pairs += f", {results['pairs_in_hand']} in the next one"
    lines = [of_run(results, "votes"), f"  {'votes':14} {pairs}"]
    if results["exported"]:
        form = shlex.quote(str(Path(results["exported"]) / "choices.txt"))
        place = shlex.quote(results["run"])
        taken = f"qzo-diffuse vote --run {place} --import {form}"
        lines.append(f"  {'exported':14} fill in {form}, then: {taken}")
    return "\n".join(lines)
