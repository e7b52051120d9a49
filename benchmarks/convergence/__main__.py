"""How soon each method gets how far: `python -m benchmarks.convergence run --data FOLDER`, then
`... report`.

`run` works through all cells that are not finished yet, one after the other, and can be stopped at
any time: the same command goes on. `--cells 'fluent_mono/row_*'` names some of them, `--minutes 30`
ends cleanly after that time. `report` writes the JSON, the table and the plot from whatever is
finished. Without either, `--style-dir DIR --budget N --seeds K --output FILE` compares the default
with the paper's step on any folder of captioned images."""

import argparse
import json
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

from benchmarks.convergence.cells import Folders, run_cell
from benchmarks.convergence.folder import compare
from benchmarks.convergence.methods import open_cells
from benchmarks.convergence.pictures import draw_all
from benchmarks.convergence.report import write_report
from benchmarks.convergence.results import final_losses, finished
from benchmarks.convergence.settings import BUDGET, DATA, UNSEEN, Cell
from benchmarks.convergence.tasks import Task, open_task
from benchmarks.record import RESULTS
from qzo_diffusion.train.interrupt import stop_on_signal

CACHE = Path.home() / ".cache/qzo_diffusion/convergence"
STOPPED = 75  # the exit code of a run that the same command goes on with (EX_TEMPFAIL)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def wanted(cell: Cell, patterns: str) -> bool:
    """Whether one of the patterns, parted by commas, names the cell: `openmoji/*`,
    `*/row_cosine_*`.
    """
    return any(fnmatch(cell.name, pattern) for pattern in patterns.split(","))


def run(data: Path, folders: Folders, patterns: str, minutes: float | None) -> bool:
    """Returns whether nothing of what was asked for is left."""
    end = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
    # The folder is not recorded: it is of one machine, and its content is described in the
    # documentation.
    command = f"python -m benchmarks.convergence run --data FOLDER --cells '{patterns}'"
    with stop_on_signal(say) as stop:
        for name in (*DATA, UNSEEN):
            task: Task | None = None
            while cells := [
                cell
                for cell in open_cells(name, final_losses(finished(folders.results)))
                if wanted(cell, patterns)
            ]:
                if stop.is_set() or time.monotonic() >= end:
                    return False
                task = task or open_task(name, data, folders.cache)
                result = run_cell(
                    cells[0],
                    task,
                    folders,
                    stop_requested=lambda: stop.is_set() or time.monotonic() >= end,
                    command=command,
                    show=True,
                )
                if result is None:
                    say(f"{cells[0].name}: stopped; the same command goes on")
                    return False
                say(
                    f"{cells[0].name}: {result['start_loss']:.4f} -> "
                    f"{result['curve'][-1][1]}, ended by {result['ended']}"
                )
    return True


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--style-dir", type=Path, help="compare on this folder of captioned images")
    parser.add_argument(
        "--budget", type=int, default=BUDGET, help="forward passes of a run on --style-dir"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--output",
        type=Path,
        help="JSON file of the figures; finished runs are kept beside it, in FILE.cells/",
    )
    verbs = parser.add_subparsers(dest="verb")
    runs, reports = (
        verbs.add_parser("run", help="run cells"),
        verbs.add_parser("report", help="write table, plot and JSON"),
    )
    pictures = verbs.add_parser(
        "pictures", help="draw what the default's longest run on each style looks like"
    )
    for verb in (runs, reports, pictures):
        verb.add_argument(
            "--results",
            type=Path,
            default=RESULTS,
            help="the folder with cells/ and convergence.json",
        )
    for verb in (runs, pictures):
        verb.add_argument(
            "--data",
            type=Path,
            required=True,
            help="the folder of emoji64.npz and meta.json; for sst2 of the .tsv files",
        )
        verb.add_argument("--cache", type=Path, default=CACHE, help="for checkpoints")
    pictures.add_argument("--output", type=Path, default=Path("docs/images"), dest="folder")
    runs.add_argument(
        "--cells",
        default="*",
        metavar="PATTERN",
        help="DATA/METHOD_SEED with wildcards, several parted by commas",
    )
    runs.add_argument(
        "--minutes", type=float, help="stop after this time, with the cell in hand checkpointed"
    )
    arguments = parser.parse_args()
    if arguments.verb is None:
        if arguments.style_dir is None or arguments.output is None:
            parser.error("say `run` or `report`, or give --style-dir and --output")
        work = arguments.output.with_name(f"{arguments.output.name}.cells")
        found = compare(arguments.style_dir, arguments.budget, arguments.seeds, work, CACHE)
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")
        return
    if arguments.verb == "report":
        write_report(arguments.results)
        return
    if not arguments.data.is_dir():
        parser.error(
            f"--data {arguments.data}: no such folder; it holds emoji64.npz and meta.json, "
            "for sst2 train.tsv and dev.tsv"
        )
    if arguments.verb == "pictures":
        with stop_on_signal(say) as stop:
            whole = draw_all(
                arguments.data,
                arguments.results,
                arguments.cache,
                arguments.folder,
                stop.is_set,
                say,
            )
    else:
        folders = Folders(arguments.results / "cells", arguments.cache)
        whole = run(arguments.data, folders, arguments.cells, arguments.minutes)
    sys.exit(0 if whole else STOPPED)


if __name__ == "__main__":
    main()
