"""Pictures in styles that the embedded model never saw, beside the exact gradient's and the true
drawings:

    python -m benchmarks.pictures run --data FOLDER --work FOLDER --cells '*/subspace_*'
    python -m benchmarks.pictures table --work FOLDER
    python -m benchmarks.pictures report --data FOLDER --work FOLDER --styles A,B,C --steps N

Cells are those of `benchmarks.content`, on the shipped weights: STYLE/METHOD_STEPS_SEED. `run`
works through those that are named and not finished; the same command goes on where it was stopped.
`report` writes benchmarks/results/pictures.json and docs/images/pictures_STYLE.png; the first of
--styles is the demo's."""

import argparse
import sys
from pathlib import Path

from benchmarks.content.__main__ import run_missing, wanted, whole_numbers
from benchmarks.content.cells import Bench
from benchmarks.content.table import results_in, table
from benchmarks.pictures.candidates import CANDIDATES, candidate_folder
from benchmarks.pictures.methods import COMPARED, EXACT, EXACT_ALL, SHOWN
from benchmarks.pictures.report import write_report, write_sheets
from qzo_diffusion import resources

IMAGES = Path(__file__).parents[2] / "docs" / "images"
STEPS = 300


def bench_of(options: argparse.Namespace) -> Bench:
    exact = (*EXACT, *EXACT_ALL)
    return Bench(options.data, options.work.resolve(), resources.PACKAGE, candidate_folder, exact)


def run(options: argparse.Namespace) -> None:
    # The folders are not recorded: they are of one machine.
    command = f"python -m benchmarks.pictures run --data FOLDER --cells '{options.cells}'"
    bench = bench_of(options)
    cells = list(wanted(COMPARED, options.cells, options.steps, options.seeds, CANDIDATES))
    if not cells:
        sys.exit(
            f"no cell is named {options.cells!r}; names are STYLE/METHOD_STEPS_SEED, styles "
            f"{', '.join(CANDIDATES)}, methods {', '.join(COMPARED)}"
        )
    run_missing(bench, cells, COMPARED, command)


def report(options: argparse.Namespace) -> None:
    bench, shown = bench_of(options), options.styles.split(",")
    results = [one for one in results_in(bench.work) if one["seed"] == 0]
    tried = {one["folder"] for one in results if one["method"] == SHOWN}
    others = [name for name in CANDIDATES if name in tried and name not in shown]
    print(write_report(results, shown, others, options.steps[0], options.demo_seconds))
    write_sheets(bench, results, [*shown, *others], options.steps[0], IMAGES)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    runs = verbs.add_parser("run", help="run cells")
    tables = verbs.add_parser("table", help="print the results")
    reports = verbs.add_parser("report", help="write pictures.json and the sheets")
    for verb in (runs, tables, reports):
        verb.add_argument("--work", type=Path, required=True, help="folder of results and runs")
    for verb in (runs, reports):
        verb.add_argument(
            "--data", type=Path, required=True, help="the folder of emoji64.npz and meta.json"
        )
        verb.add_argument("--steps", type=whole_numbers, default=[STEPS], help="such as 300,1200")
    runs.add_argument("--cells", default="*", metavar="PATTERN", help="with wildcards and commas")
    runs.add_argument("--seeds", type=whole_numbers, default=[0], help="such as 0,1,2")
    reports.add_argument("--styles", required=True, help="three: the demo's and two others")
    reports.add_argument("--demo-seconds", type=float, help="of `make demo` on an idle machine")
    options = parser.parse_args()
    if options.verb == "run":
        run(options)
    elif options.verb == "report":
        report(options)
    else:
        print(table(results_in(options.work)))


if __name__ == "__main__":
    main()
