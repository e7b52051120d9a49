"""The command line: verbs, flags and exit codes.

Heavy libraries are imported when a verb runs, so `--help` answers at once.
"""

import argparse
import logging
import os
import stat
import sys
from collections.abc import Callable, Sequence

from qzo_diffusion import __version__
from qzo_diffusion.commands import (
    doctor,
    evaluate,
    export,
    llm,
    mix,
    replay,
    sample,
    settings,
    subspace,
    train,
    validate,
    vote,
)
from qzo_diffusion.commands import report as report_command
from qzo_diffusion.config.arguments import (
    Parser,
    check_names,
)
from qzo_diffusion.system.console import INTERRUPTED, MENDABLE, quiet, report
from qzo_diffusion.system.signals import interrupted_by_sigterm
from qzo_diffusion.system.streams import unbreakable


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
# How long OpenMP's threads spin before they sleep, read when torch is imported: libgomp's turns,
# and milliseconds of Intel's and LLVM's library. By default they spin ten times as long and more,
# and where other work runs they take the cores from the threads that they wait for. Threads that
# sleep at once wake too late on an idle machine (docs/decisions/speed_and_memory.md D107).
SPINNING = {"GOMP_SPINCOUNT": "30000", "KMP_BLOCKTIME": "1"}


def _main(arguments: Sequence[str] | None) -> int:
    os.environ.update(OFFLINE)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.update(SPINNING | os.environ)
    os.umask(os.umask(0o077) | stat.S_IWOTH)  # nothing that a verb makes is world-writable
    # a note on an optional package that nobody asked for
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        options = parse(arguments)
        verb: Callable[[argparse.Namespace], int] = options.verb
        with quiet(getattr(options, "quiet", False)), interrupted_by_sigterm():
            code = verb(options)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        # one place decides what a user sees; our own bugs keep their traceback
        from qzo_diffusion.core.errors import UserError
        from qzo_diffusion.runs.publish import without_secrets

        told = error if isinstance(error, UserError) else _out_of_memory(error)
        if told is not None:
            report(without_secrets(f"qzo-diffuse: {type(told).__name__}\n{told}"))
            return MENDABLE
        raise


def _out_of_memory(error: Exception) -> Exception | None:
    if "torch" not in sys.modules:  # where its import failed, that error is the one to show
        return None
    from qzo_diffusion import devices

    return devices.out_of_memory(error)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """argparse takes the key=value settings of `train` in one place only; here they may stand
    anywhere between the flags.
    """
    check_names(sys.argv[1:] if arguments is None else arguments)
    parser = make_parser()
    options, rest = parser.parse_known_args(arguments)
    given = getattr(options, "settings", None)
    wrong = [text for text in rest if given is None or text.startswith("-") or "=" not in text]
    if wrong:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if rest and given is not None:
        given.extend(rest)
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
    vote.add(verbs)
    evaluate.add(verbs)
    report_command.add(verbs)
    llm.add(verbs)
    replay.add(verbs)
    mix.add(verbs)
    export.add(verbs)
    subspace.add(verbs)
    validate.add(verbs)
    settings.add(verbs)
    doctor.add(verbs)
    return parser


if __name__ == "__main__":
    sys.exit(main())
