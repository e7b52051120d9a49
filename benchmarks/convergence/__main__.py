"""How soon each method gets how far, and what its pictures keep:

    python -m benchmarks.convergence run --data FOLDER --work FOLDER
    python -m benchmarks.convergence report --work FOLDER
    python -m benchmarks.convergence --style-dir DIR --output FILE

`run` works through the cells that are not finished, then judges pictures; the same command goes on
where it was stopped. `report` writes convergence.json, the table of docs/convergence.md and its
plot, from the cells of WORK and those that are recorded. With --style-dir the losses of all methods
are compared on any folder of captioned images."""

import argparse
import json
import sys
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from benchmarks.content.cells import Bench
from benchmarks.convergence.cells import judge_open, run_open
from benchmarks.convergence.folder import compare
from benchmarks.convergence.methods import BUDGET, EXPONENTS, FAMILIES
from benchmarks.convergence.report import STYLES, write_report
from benchmarks.convergence.results import recorded
from benchmarks.pictures.candidates import CANDIDATES, candidate_folder
from qzo_diffusion import resources

HELD_OUT = 32
NAME = "convergence"  # of its folder in WORK, which other benchmarks may use as well


def bench_of(data: Path, work: Path) -> Bench:
    folder = partial(candidate_folder, held_out=HELD_OUT)
    return Bench(data, work.resolve() / NAME, resources.PACKAGE, folder)


def run(options: argparse.Namespace, command: str) -> None:
    bench, patterns = bench_of(options.data, options.work), options.cells.split(",")

    def wanted(name: str) -> bool:
        return any(fnmatch(name, pattern) for pattern in patterns)

    names = [name for style in options.styles.split(",") for name in _possible_names(style)]
    if not any(map(wanted, names)):
        sys.exit(
            f"no cell is named {options.cells!r}; names are STYLE/METHOD_STEPS_SEED, methods "
            f"{', '.join(FAMILIES)}, with their rate where they have a grid"
        )
    for style in options.styles.split(","):
        results = run_open(bench, style, recorded(), command, wanted=wanted)
        judge_open(bench, style, results, wanted)


def _possible_names(style: str) -> list[str]:
    """Of all cells that there may be."""
    return [
        family.cell(style, exponent, seed).name
        for family in FAMILIES.values()
        for exponent in (EXPONENTS if family.grid else (None,))
        for seed in range(family.seeds)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--style-dir", type=Path, help="compare on this folder of captioned images")
    parser.add_argument("--budget", type=int, default=BUDGET, help="forward passes of its runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--output", type=Path, help="JSON of its figures; finished runs are kept in FILE.cells/"
    )
    verbs = parser.add_subparsers(dest="verb")
    runs = verbs.add_parser("run", help="run cells")
    reports = verbs.add_parser("report", help="write table, plot and JSON")
    for verb in (runs, reports):
        verb.add_argument("--work", type=Path, required=True, help="folder of results and runs")
    runs.add_argument(
        "--data", type=Path, required=True, help="the folder of emoji64.npz and meta.json"
    )
    of = f"parted by commas, of {', '.join(CANDIDATES)}"
    runs.add_argument("--styles", default=",".join(STYLES), help=of)
    runs.add_argument(
        "--cells",
        default="*",
        metavar="PATTERN",
        help="STYLE/METHOD_STEPS_SEED with wildcards, several parted by commas",
    )
    options = parser.parse_args()
    if options.verb == "run":
        # The folders are not recorded: they are of one machine.
        command = (
            "python -m benchmarks.convergence run --data FOLDER --work FOLDER "
            f"--styles {options.styles} --cells '{options.cells}'"
        )
        run(options, command)
    elif options.verb == "report":
        write_report(options.work / NAME)
    elif options.style_dir is None or options.output is None:
        parser.error("say `run` or `report`, or give --style-dir and --output")
    else:
        work = options.output.with_name(f"{options.output.name}.cells")
        found = compare(options.style_dir, options.budget, options.seeds, work)
        options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
