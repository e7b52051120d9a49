"""LSQ, Grass, WTA-CRS and AdamW on SST-2: `python -m benchmarks.rivals run --data FOLDER`.

`run` trains each that has no result yet, on SmolLM2 with the data of `benchmarks.llm_compare`;
`memory` measures a step of each over inference, each in a process of its own. Results go to
benchmarks/results/cells/rivals. FOLDER holds sst2/."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.llm_compare.methods import Places
from benchmarks.record import RESULTS, provenance, write_results
from benchmarks.resident import FREED_AT_ONCE
from benchmarks.rivals import run
from benchmarks.rivals.methods import METHODS
from benchmarks.smollm2 import smollm2


def cell(results: Path, name: str) -> Path:
    return results / "cells" / "rivals" / "sst2" / f"{name}_{run.SEED}.json"


def train_missing(names: list[str], places: Places) -> None:
    for name in names:
        path = cell(places.results, name)
        if not path.exists():
            found = run.train(name, places) | {"provenance": provenance()}
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found, indent=1) + "\n")
            print(name, found["value"], file=sys.stderr)


def measure_all(names: list[str], places: Places) -> dict[str, Any]:
    found = {}
    for name in names:
        command = [sys.executable, "-m", "benchmarks.rivals", "memory", "--one", name]
        where = ["--data", str(places.data), "--model", str(places.model)]
        output = subprocess.run(
            [*command, *where],
            check=True,
            capture_output=True,
            text=True,
            env=os.environ | FREED_AT_ONCE,
        ).stdout
        found[name] = json.loads(output.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=["run", "memory"])
    parser.add_argument("--data", type=Path, required=True, help="the folder of the tasks' data")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--model", type=Path, help="a transformers folder; default SmolLM2")
    parser.add_argument("--steps", type=int, help="of every run, for a quick look")
    parser.add_argument(
        "--one", choices=METHODS, help="memory of one method, printed (used by the whole)"
    )
    options = parser.parse_args()
    places = Places(
        options.results, Path(), options.data, options.model or smollm2(), options.steps
    )
    if options.one:
        print(json.dumps(run.memory(options.one, places)))
    elif options.verb == "memory":
        measured = {"methods": measure_all(options.methods, places)}
        print(write_results("rivals_memory", measured, places.results))
    else:
        train_missing(options.methods, places)


if __name__ == "__main__":
    main()
