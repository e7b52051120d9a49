"""The rest of the field beside QZO: `python -m benchmarks.comparison states`.

`states` runs Adam with few bits a number (`states.py`); folders of runs stay in --cache, and a call
goes on with what is missing. Parts of comparison.json are written one by one."""

import argparse
from pathlib import Path

from benchmarks.comparison import states
from benchmarks.record import RESULTS, update_results

NAME = "comparison"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=["states"])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path.home() / ".cache/qzo_diffusion/comparison",
        help="for run folders",
    )
    options = parser.parse_args()
    found = {"states": states.measure(options.cache)}
    print(update_results(NAME, options.verb, found, {}, options.results))


if __name__ == "__main__":
    main()
