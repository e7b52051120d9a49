"""What tuning by rewards does and costs, a row a call: `OMP_NUM_THREADS=2 python -m
benchmarks.rewards compressibility --work FOLDER`.

Rows: compressibility, style (--style-dir), cma_es (needs compressibility of the same --work, and
`pip install cma`), step, kills, votes (--style-dir; a simulated voter). A row that was stopped goes
on with the same command. A finished row is written into benchmarks/results/rewards.json beside the
others."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, provenance
from benchmarks.rewards.cma_es import cma_es
from benchmarks.rewards.kills import kills
from benchmarks.rewards.rows import compressibility, style
from benchmarks.rewards.step_cost import step_cost
from benchmarks.rewards.voter import PAIRS, votes

NAME = "rewards"
ROWS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "compressibility": compressibility,
    "style": style,
    "cma_es": cma_es,
    "step": step_cost,
    "kills": kills,
    "votes": votes,
}


def written(name: str, figures: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Put a row's figures beside those of other rows; keys that start with `=` go to the top."""
    path = folder / f"{NAME}.json"
    found = json.loads(path.read_text()) if path.is_file() else {"provenance": {}}
    top = {key[1:]: value for key, value in figures.items() if key.startswith("=")}
    own = {key: value for key, value in figures.items() if not key.startswith("=")}
    found |= {name: own, **top}
    found["provenance"][name] = provenance()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("row", choices=ROWS)
    parser.add_argument("--work", type=Path, required=True, help="folder of runs and pictures")
    parser.add_argument("--steps", type=int, default=150, help="of a run")
    parser.add_argument("--style-dir", type=Path, help="pictures that the base never saw")
    parser.add_argument(
        "--pairs", type=int, nargs="+", default=PAIRS, help="of each run of the row votes"
    )
    parser.add_argument("--model", default="tiny", help="such as a smaller one, for a test")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of rewards.json")
    parser.add_argument(
        "settings", nargs="*", metavar="section.key=value", help="other settings of the run"
    )
    options = parser.parse_args()
    print(written(options.row, ROWS[options.row](options), options.output))


if __name__ == "__main__":
    main()
