"""QZO beside MeZO, QLoRA and first order on real language-model tasks: `python -m
benchmarks.llm_compare run --data FOLDER`.

Every cell is a run of `qzo-diffuse llm` on SmolLM2-135M-Instruct: a task, a method, a seed. Cells
that are finished are skipped, one that was stopped goes on, and none takes more than --minutes of
the processor. `memory` measures the peaks of a step and of inference, `report` writes the JSON, the
table and the plot from whatever is finished. FOLDER holds sst2/, rte/, superglue_CB/,
superglue_BoolQ/ and xquad.en.json."""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.llm_compare import memory
from benchmarks.llm_compare.cells import run_cell
from benchmarks.llm_compare.methods import METHODS, Places, cells
from benchmarks.llm_compare.report import report
from benchmarks.record import RESULTS, write_results
from benchmarks.smollm2 import smollm2
from qzo_diffusion.train.interrupt import stop_on_signal


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=["run", "memory", "report"])
    parser.add_argument(
        "--data", type=Path, default=Path("."), help="the folder of the tasks' data"
    )
    parser.add_argument(
        "--cells",
        default="*",
        metavar="PATTERN",
        help="TASK/METHOD_SEED with wildcards, several parted by commas",
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path.home() / ".cache/qzo_diffusion/llm_compare",
        help="for run folders",
    )
    parser.add_argument(
        "--model",
        type=Path,
        help="a transformers folder; default SmolLM2, converted where it isn't there yet",
    )
    parser.add_argument("--steps", type=int, help="of every run, for a quick look")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="of every run; float32 where the processor emulates bfloat16",
    )
    parser.add_argument(
        "--minutes", type=float, default=40, help="of the processor, at most, in a cell"
    )
    parser.add_argument(
        "--method",
        choices=[*METHODS, "adamw"],
        help="memory of one method, printed (used by the whole)",
    )
    parser.add_argument("--document", type=Path, default=Path("docs/llm.md"))
    options = parser.parse_args()
    if options.dtype and options.verb != "run":
        parser.error("--dtype is for run")
    places = Places(
        options.results,
        options.cache,
        options.data,
        options.model or smollm2(),
        options.steps,
        options.dtype,
        options.minutes,
    )
    if options.verb == "report":
        print(report(places, options.document))
    elif options.method:
        print(json.dumps(memory.measure(options.method, places)))
    elif options.verb == "memory":
        print(write_results("llm_memory", {"methods": memory.measure_all(places)}, places.results))
    else:
        with stop_on_signal(lambda text: print(text, file=sys.stderr)) as stop:
            for cell in cells(options.cells):
                if not places.result(cell).exists() and run_cell(cell, places, stop) is None:
                    sys.exit(75)


if __name__ == "__main__":
    main()
