"""Does tuning keep the content? Judged by pictures: `python -m benchmarks.content run --data FOLDER
--work FOLDER --cells 'twemoji24/default*'`, then `... table --work FOLDER`.

A cell is a folder of images, a method, a number of steps and a seed. `run` works through those that
are named and not finished yet; the same command goes on where it was stopped. `report` writes
benchmarks/results/content.json for the method that is the new default."""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

from benchmarks.content.cells import Bench, Cell, is_done, run_cell
from benchmarks.content.embedded import embedded, unpack
from benchmarks.content.folders import FOLDERS
from benchmarks.content.methods import DEFAULT, METHODS, STEPS, Settings, merged
from benchmarks.content.table import results_in, table, write_report


def methods_of(file: Path | None) -> dict[str, Settings]:
    """The named methods, and those of a JSON file {name: what is other than in `default`}."""
    if file is None:
        return METHODS
    more = json.loads(file.read_text())
    return METHODS | {name: merged(DEFAULT, other) for name, other in more.items()}


def wanted(
    methods: dict[str, Settings],
    patterns: str,
    steps: Sequence[int],
    seeds: Sequence[int],
    folders: Iterable[str] = FOLDERS,
) -> Iterator[Cell]:
    """The cells that a pattern names, seed by seed."""
    for seed in seeds:
        for folder in folders:
            for method in methods:
                for count in steps:
                    cell = Cell(folder, method, count, seed)
                    if any(fnmatch(cell.name, pattern) for pattern in patterns.split(",")):
                        yield cell


def run(options: argparse.Namespace) -> None:
    methods = methods_of(options.methods)
    # The folders are not recorded: they are of one machine.
    command = f"python -m benchmarks.content run --data FOLDER --cells '{options.cells}'"
    package = unpack(options.work.resolve())
    bench = Bench(options.data, options.work.resolve(), package)
    cells = list(wanted(methods, options.cells, options.steps, options.seeds))
    if not cells:
        sys.exit(
            f"no cell is named {options.cells!r}; names are FOLDER/METHOD_STEPS_SEED, folders "
            f"{', '.join(FOLDERS)}, methods {', '.join(methods)}"
        )
    with embedded(package):
        run_missing(bench, cells, methods, command)


def run_missing(
    bench: Bench, cells: Iterable[Cell], methods: dict[str, Settings], command: str
) -> None:
    """Run the cells that have no result of these very settings, and print each result."""
    for cell in cells:
        if not is_done(bench, cell, methods[cell.method]):
            result = run_cell(bench, cell, methods[cell.method], command)
            print(table([result]), flush=True)


def whole_numbers(text: str) -> list[int]:
    """ "0,1,2" -> [0, 1, 2]"""
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    runs = verbs.add_parser("run", help="run cells")
    tables = verbs.add_parser("table", help="print the results")
    reports = verbs.add_parser("report", help="write content.json")
    for verb in (runs, tables, reports):
        verb.add_argument("--work", type=Path, required=True, help="folder of results and runs")
    runs.add_argument(
        "--data", type=Path, required=True, help="the folder of emoji64.npz and meta.json"
    )
    runs.add_argument(
        "--cells",
        default="*",
        metavar="PATTERN",
        help="FOLDER/METHOD_STEPS_SEED with wildcards, several parted by commas",
    )
    runs.add_argument("--steps", type=whole_numbers, default=[STEPS], help="such as 300,1200")
    runs.add_argument("--seeds", type=whole_numbers, default=[0], help="such as 0,1,2")
    runs.add_argument("--methods", type=Path, help="JSON file of further methods")
    reports.add_argument("--winner", required=True, help="method that is the new default")
    reports.add_argument("--steps", type=int, default=STEPS, help="of the cells that count")
    options = parser.parse_args()
    if options.verb == "run":
        run(options)
    elif options.verb == "table":
        print(table(results_in(options.work)))
    else:
        print(write_report(options.work, options.winner, options.steps))


if __name__ == "__main__":
    main()
