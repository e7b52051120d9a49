"""The rest of the field beside QZO: `python -m benchmarks.comparison states|report`.

`states` runs Adam with few bits a number (`states.py`); folders of runs stay in --cache, and a call
goes on with what is missing. `report` collects SST-2 from the results of `benchmarks.llm_compare`,
`benchmarks.quzo` and `benchmarks.rivals`, and writes the tables of docs/comparison.md. Parts of
comparison.json are written one by one."""

import argparse
from pathlib import Path

from benchmarks.comparison import report, states
from benchmarks.record import RESULTS, update_results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=["states", "report"])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path.home() / ".cache/qzo_diffusion/comparison",
        help="for run folders",
    )
    parser.add_argument("--document", type=Path, default=Path("docs/comparison.md"))
    parser.add_argument("--bits", type=int, nargs="+", choices=states.BITS, default=states.BITS)
    options = parser.parse_args()
    if options.verb == "report":
        print(report.report(options.results, options.document))
    else:
        found = {"states": states.measure(options.cache, options.bits)}
        print(update_results(report.NAME, options.verb, found, {}, options.results))


if __name__ == "__main__":
    main()
